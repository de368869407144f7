"""Zero-shot, AdapEmu and AdapFu on held-out text."""

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .lora import SplitModel
from .losses import hidden_state_loss, masked_kl
from .sharding import deal, runnable, shards_parameters
from .teacher import OutputHead, capture, causal_lm, run_full_model
from .trainer import RoundTrainer


class Evaluator:
    """
    Evaluates a full model and its emulator on held-out private text.

    Args:
        models ([`SplitModel`]): The models. Whoever evaluates them loads the LoRAs first.
        trainer ([`RoundTrainer`]): Tokenizes and collates the text as it does the clients'.
        dataset ([`~datasets.Dataset`]): Held-out text.

    Raises:
        ValueError: If `args.eval_exact_match` is set and the text has no plain prompts and completions, or there is no
            token to evaluate.
    """

    def __init__(self, models: SplitModel, trainer: RoundTrainer, dataset: Dataset):
        self.args = trainer.args
        if self.args.eval_exact_match:
            _check_generation_columns(dataset)
        if self.args.eval_drift and shards_parameters(trainer.accelerator):
            raise ValueError(
                "`eval_drift` is True, but it runs the emulator and the full model side by side, which is not implemented "
                "under DeepSpeed ZeRO-3 and FSDP2. Leave it out, or use DDP or ZeRO-2."
            )
        self.models, self.dataset = models, dataset
        self.processing_class = trainer.processing_class
        self.data_collator = DataCollatorForLanguageModeling(self.processing_class.pad_token_id)
        self.accelerator = trainer.accelerator
        self.tokens = trainer.prepare(dataset, "`eval_dataset`", packing=False)
        self._zero_shot: dict[str, float] = {}

    def zero_shot(self, generate: bool = False) -> dict[str, float]:
        """The full model without any LoRA. Computed once."""
        full = self.models.full
        if not self._zero_shot or (generate and "exact_match" not in self._zero_shot):
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
                max_new_tokens, tokenizer = self.args.eval_max_new_tokens, self.processing_class
                metrics |= evaluate_exact_match(
                    model, self.dataset, tokenizer, batch_size, max_new_tokens, self.accelerator
                )
        return metrics


def _check_generation_columns(dataset):
    columns = dataset.column_names
    if "prompt" not in columns or "completion" not in columns or not isinstance(dataset[0]["prompt"], str):
        raise ValueError(
            "`eval_exact_match` is set, but `eval_dataset` has no plain `prompt` and `completion` columns "
            f"(it has: {', '.join(columns)}). Bring it into prompt-completion form, or leave the setting out."
        )


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
def evaluate_exact_match(
    model: PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    batch_size: int,
    max_new_tokens: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """
    Share of prompts whose greedy completion equals the reference, surrounding white space aside.

    Args:
        dataset ([`~datasets.Dataset`]): Prompt-completion text (plain strings).

    Returns:
        `dict[str, float]`: `exact_match`.
    """
    model.eval()
    prompts, references = dataset["prompt"], dataset["completion"]
    side, processing_class.padding_side = processing_class.padding_side, "left"
    correct = torch.zeros((), dtype=torch.float64)
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
            texts = processing_class.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            if counts:
                correct += sum(text.strip() == references[i].strip() for text, i in zip(texts, rows, strict=True))
    finally:
        processing_class.padding_side = side
    return {"exact_match": accelerator.reduce(correct.to(accelerator.device)).item() / len(prompts)}


def _batches(items, batch_size: int) -> list[list[int]]:
    """Row numbers in batches of similar length, longest first, so that little is padded and memory peaks early."""
    lengths = [len(item) for item in items]
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
