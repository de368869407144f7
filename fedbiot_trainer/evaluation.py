"""Zero-shot, AdapEmu and AdapFu on held-out text."""

import re
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .config import FedBiOTConfig
from .lora import SplitModel
from .losses import hidden_state_loss, masked_kl
from .sharding import deal, runnable, shards_parameters
from .teacher import OutputHead, capture, causal_lm, run_full_model
from .trainer import RoundTrainer


METRICS = Path(__file__).parent / "metrics"
SHIPPED = ("exact_match", "gsm8k_accuracy", "pass_at_k")
LOSS_METRICS = {"loss", "token_accuracy"}
# Where a function that a prompt has begun ends: before the first line that is neither indented nor a closing bracket.
END_OF_FUNCTION = re.compile(r"\n(?=[^\s)\]}])")


class TextMetric:
    """
    An `evaluate` module that compares completions of a dataset's prompts with its references.

    Args:
        args ([`FedBiOTConfig`]): Names the module (`eval_metric`) and the column (`eval_reference_column`).
        dataset ([`~datasets.Dataset`]): Has the references, and plain strings in `prompt`.

    Raises:
        ValueError: If the dataset lacks one of them, or the module cannot be loaded or does not give a number for the
            first example.
    """

    def __init__(self, args: FedBiOTConfig, dataset: Dataset | None):
        name, column = args.eval_metric, args.eval_reference_column
        if not dataset:
            raise ValueError(
                f"`eval_metric` is '{name}', but `eval_dataset` is {'None' if dataset is None else 'empty'}, so there "
                "are no prompts."
            )
        columns = dataset.column_names
        if "prompt" not in columns or not isinstance(dataset[0]["prompt"], str):
            raise ValueError(
                f"`eval_metric` is '{name}', but `eval_dataset` has no plain `prompt` column (it has: "
                f"{', '.join(columns)}). Bring it into prompt-completion form, or leave the setting out."
            )
        if column not in columns:
            raise ValueError(
                f"`eval_reference_column` is '{column}', but `eval_dataset` has no such column (it has: "
                f"{', '.join(columns)}). Name the one with the references of `eval_metric`."
            )
        self.module = _load_module(name)
        self.prompts, self.references = dataset["prompt"][:], dataset[column][:]
        self.completes_code = self.module.name == "pass_at_k" and "entry_point" in columns
        if self.completes_code:
            self.references = [
                f"{tests}\ncheck({function})"
                for tests, function in zip(self.references, dataset["entry_point"], strict=True)
            ]
        result = self._compute(self.prompts[:1], self.references[:1])  # what cannot work fails now, not after training
        if not result:
            raise ValueError(
                f"`eval_metric` is '{name}', but for the first example it returns no number. Use a module that returns "
                "a `dict` with one."
            )

    def _compute(self, predictions, references):
        result = self.module.compute(predictions=predictions, references=references)
        return {
            key: float(value) for key, value in result.items() if isinstance(value, Real) and key not in LOSS_METRICS
        }

    def compute(self, completions: Sequence[str], accelerator: Accelerator) -> dict[str, float]:
        """
        Compute the metric, in the main process.

        Args:
            completions (sequence of `str`): One for each prompt.
            accelerator (`Accelerator`): Tells the processes, which all get the result.

        Returns:
            `dict[str, float]`: The numbers among what the module returns, but for a `loss` or `token_accuracy`.
        """
        results = [None]
        if accelerator.is_main_process:
            if self.completes_code:
                pairs = zip(self.prompts, completions, strict=True)
                completions = [prompt + END_OF_FUNCTION.split(text, maxsplit=1)[0] for prompt, text in pairs]
            results = [self._compute(completions, self.references)]
        return broadcast_object_list(results)[0]


def _load_module(name):
    try:
        return evaluate.load(str(METRICS / name) if name in SHIPPED else name, keep_in_memory=True)
    except (OSError, ImportError) as error:
        raise ValueError(
            f"`eval_metric` is '{name}', which cannot be loaded ({error}). Use one of {', '.join(SHIPPED)}, or the folder "
            "of an `evaluate` module that holds a script of the same name."
        ) from error


class Evaluator:
    """
    Evaluates a full model and its emulator on held-out private text.

    Args:
        models ([`SplitModel`]): The models. Whoever evaluates them loads the LoRAs first.
        trainer ([`RoundTrainer`]): Tokenizes and collates the text as it does the clients'.
        dataset ([`~datasets.Dataset`]): Held-out text.
        text_metric ([`TextMetric`], *optional*): The metric of generated text, on the same text.

    Raises:
        ValueError: If there is no token to evaluate.
    """

    def __init__(
        self, models: SplitModel, trainer: RoundTrainer, dataset: Dataset, text_metric: TextMetric | None = None
    ):
        self.args = trainer.args
        if self.args.eval_drift and shards_parameters(trainer.accelerator):
            raise ValueError(
                "`eval_drift` is True, but it runs the emulator and the full model side by side, which is not implemented "
                "under DeepSpeed ZeRO-3 and FSDP2. Leave it out, or use DDP or ZeRO-2."
            )
        if self.args.eval_drift:
            OutputHead(causal_lm(models.full)).check(models, self.args.device)
        self.models, self.text_metric = models, text_metric
        self.processing_class = trainer.processing_class
        self.data_collator = DataCollatorForLanguageModeling(self.processing_class.pad_token_id)
        self.accelerator = trainer.accelerator
        self.tokens = trainer.prepare(dataset, "`eval_dataset`", packing=False)
        self._zero_shot: dict[str, float] = {}

    def zero_shot(self, generate: bool = False) -> dict[str, float]:
        """The full model without any LoRA. Computed once."""
        full = self.models.full
        if not self._zero_shot or (generate and self._zero_shot.keys() == LOSS_METRICS):
            with self.models.whole_on(self.args.device), full.disable_adapter():
                self._zero_shot = self._evaluate(full, generate)
        return self._zero_shot

    def adapted(self, generate: bool = False) -> dict[str, dict[str, float]]:
        """`adap_emu` (emulator + adapter layers) and `adap_fu` (full model + adapter layers) as of now."""
        adap_emu = self._evaluate(self.models.emulator, generate)
        with self.models.whole_on(self.args.device):
            return {"adap_emu": adap_emu, "adap_fu": self._evaluate(self.models.full, generate)}

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """
        How far the emulator is from the full model on this text, as of now.

        Returns:
            `dict[str, float]`: `drift_l2` and `drift_kl`, the two terms of the alignment loss: means over all tokens.
        """
        models, split, totals = self.models, self.models.split, torch.zeros(3, dtype=torch.float64)
        head, emulator = OutputHead(causal_lm(models.full)), models.emulator.eval()
        batches = _batches(self.tokens["input_ids"], self.args.per_device_eval_batch_size)
        with models.whole_on(self.args.device), self.accelerator.autocast(), head.whole() as logits:
            for rows, counts in deal(batches, self.accelerator):
                batch = self.data_collator([self.tokens[i] for i in rows])
                text = {key: batch[key].to(self.accelerator.device) for key in ("input_ids", "attention_mask")}
                teacher, mask = run_full_model(models, text), text["attention_mask"]
                with capture(emulator, split.layers_name, split.top_position) as student:
                    causal_lm(emulator).base_model(**text, use_cache=False)
                if counts:
                    l2 = hidden_state_loss(student.entering, teacher.entering, mask).item()
                    kl = masked_kl(student.last, teacher.last, mask, logits).item()
                    totals += torch.tensor([l2, kl, mask.sum().item()])
        l2, kl, tokens = self.accelerator.reduce(totals.to(self.accelerator.device)).tolist()
        return {"drift_l2": l2 / tokens, "drift_kl": kl / tokens}

    def _evaluate(self, model, generate):
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast(), runnable(model, self.accelerator):
            metrics = evaluate_loss(model, self.tokens, self.data_collator, batch_size, self.accelerator)
            if generate:
                prompts, max_new_tokens = self.text_metric.prompts, self.args.eval_max_new_tokens
                completions = complete(
                    model, prompts, self.processing_class, batch_size, max_new_tokens, self.accelerator
                )
        if generate:
            metrics |= self.text_metric.compute(completions, self.accelerator)
        return metrics


@torch.no_grad()
def evaluate_loss(
    model: PreTrainedModel, dataset: Dataset, data_collator, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """
    Loss and token accuracy of `model`, over all tokens with a label.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        dataset ([`~datasets.Dataset`]): Tokenized, with `input_ids` and `labels`.
        data_collator (callable): Makes padded batches of it.
        batch_size (`int`): Examples per batch and process.
        accelerator (`Accelerator`): Tells the processes that share the work.

    Returns:
        `dict[str, float]`: `loss` (nats per token) and `token_accuracy` (share of tokens that greedy decoding under
        teacher forcing gets right).
    """
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)
    for rows, counts in deal(_batches(dataset["input_ids"], batch_size), accelerator):
        batch = data_collator([dataset[i] for i in rows])
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        kept = labels != -100
        logits, labels = logits[kept].float(), labels[kept]
        if counts:
            loss = F.cross_entropy(logits, labels, reduction="sum").item()
            totals += torch.tensor([loss, (logits.argmax(-1) == labels).sum().item(), labels.numel()])
    loss, correct, tokens = accelerator.reduce(totals.to(accelerator.device)).tolist()
    return {"loss": loss / tokens, "token_accuracy": correct / tokens}


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    prompts: Sequence[str],
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    accelerator: Accelerator,
) -> list[str]:
    """
    Complete prompts greedily.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): Run in evaluation mode.
        prompts (sequence of `str`): Texts.
        processing_class (`PreTrainedTokenizerBase`): The model's tokenizer.
        batch_size (`int`): Prompts per batch and process.
        max_new_tokens (`int`): Tokens to generate at most per prompt.
        accelerator (`Accelerator`): Tells the processes that share the work.

    Returns:
        `list[str]`: The completions in the order of the prompts, the same in each process.
    """
    model.eval()
    texts = []
    side, processing_class.padding_side = processing_class.padding_side, "left"
    try:
        for rows, counts in deal(_batches(prompts, batch_size), accelerator):
            batch = processing_class([prompts[i] for i in rows], padding=True, return_tensors="pt")
            batch = batch.to(accelerator.device)
            batch.pop("token_type_ids", None)
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=processing_class.pad_token_id,
                eos_token_id=processing_class.eos_token_id,
                synced_gpus=shards_parameters(accelerator),
            )
            if counts:
                # Decoded with their prompts: alone, many tokenizers drop the white space at the start of a completion.
                whole = processing_class.batch_decode(output, skip_special_tokens=True)
                starts = processing_class.batch_decode(batch["input_ids"], skip_special_tokens=True)
                texts += [(i, text[len(start) :]) for i, text, start in zip(rows, whole, starts, strict=True)]
    finally:
        processing_class.padding_side = side
    return [text for _, text in sorted(gather_object(texts))]


def _batches(items, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that little is padded and memory peaks early."""
    lengths = [len(item) for item in items]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
