"""Zero-shot, AdapEmu and AdapFu on held-out text."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from datasets import Dataset, concatenate_datasets
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..server.hidden_states import tensors_digest, texts_digest
from ..server.split_model import SplitModel
from ..shared.lora_state import get_lora_state
from ..shared.processes import runnable
from ..shared.records import LOSS_METRICS
from ..shared.round_trainer import RoundTrainer
from ..shared.text_loss import evaluate_loss
from ..shared.texts import trained_tokens
from ..shared.tokenizers import prompt_tokens
from .passes import complete
from .text_metric import TextMetric


ZERO_SHOT = "zero-shot"


class Evaluator:
    """
    Evaluates a full model and its emulator on held-out private text. With the same LoRAs, nothing is measured twice.

    Args:
        models ([`SplitModel`]): The models. Whoever evaluates them loads the LoRAs first.
        trainer ([`RoundTrainer`]): Tokenizes and collates the text as it does the clients'.
        dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Held-out text. Of several sets, each is reported by name (`<name>_loss`) besides the means over all tokens.
        text_metric ([`TextMetric`] or `dict[str, TextMetric]`, *optional*):
            The metric of generated text, on the same text; of several sets, for each.

    Attributes:
        digest (`str`): Of all tokens, and of which of them count.

    Raises:
        ValueError: If there is no token to evaluate, or no position for one to generate.
    """

    def __init__(
        self,
        models: SplitModel,
        trainer: RoundTrainer,
        dataset: Dataset | Mapping[str, Dataset],
        text_metric: TextMetric | Mapping[str, TextMetric] | None = None,
    ):
        self.args = trainer.args
        self.models = models
        self.processing_class = trainer.processing_class
        self.data_collator = DataCollatorForLanguageModeling(self.processing_class.pad_token_id)
        self.accelerator = trainer.accelerator
        named = dataset if isinstance(dataset, Mapping) else {"": dataset}
        self._sets = {
            name: trainer.prepare(text, f"`eval_dataset['{name}']`" if name else "`eval_dataset`", packing=False)[0]
            for name, text in named.items()
        }
        columns = ("input_ids", "labels")
        self.tokens = concatenate_datasets([tokens.select_columns(list(columns)) for tokens in self._sets.values()])
        self.digest = texts_digest(self.tokens, columns)
        self._metrics: Mapping[str, TextMetric] = {}
        if text_metric is not None:
            self._metrics = text_metric if isinstance(text_metric, Mapping) else {"": text_metric}
        self._check_room(trainer)
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self._known: dict[str, dict[str, float]] = {}

    def _check_room(self, trainer):
        """Whether the model has positions for what is generated."""
        positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
        for metric in self._metrics.values():
            longest = max(len(prompt_tokens(prompt, self.processing_class)) for prompt in metric.prompts)
            if positions is not None and longest + self.args.eval_max_new_tokens > positions:
                raise ValueError(
                    f"`eval_max_new_tokens` is {self.args.eval_max_new_tokens} and the longest prompt of `eval_dataset` "
                    f"has {longest} tokens, but the model has {positions} positions. Lower it, or leave long prompts out."
                )

    def remember_zero_shot(self, scores: dict[str, float] | None):
        """Take [`zero_shot`]'s losses from an earlier run, if it had the same sets."""
        if scores is not None and scores.keys() >= self.loss_metrics:
            self._known[ZERO_SHOT] = {name: scores[name] for name in scores if name in self.loss_metrics}

    def forget(self):
        """Measure anew what is asked for next."""
        self._known.clear()

    def zero_shot(self, generate: bool = False) -> dict[str, float]:
        """The full model without any LoRA."""
        return self._scores(ZERO_SHOT, self.models.adap_fu, generate)

    def adapted(self, generate: bool = False) -> dict[str, dict[str, float]]:
        """`adap_emu` (emulator + adapter layers) and `adap_fu` (full model + adapter layers) as of now."""
        adap_fu = self.adap_fu(generate)
        # With nothing dropped the emulator LoRA stays zero, and they compute the same.
        same = not self.models.split.dropped
        return {"adap_emu": adap_fu if same else self._adapted(self.models.adap_emu, generate), "adap_fu": adap_fu}

    def adap_fu(self, generate: bool = False) -> dict[str, float]:
        """The second of these alone."""
        return self._adapted(self.models.adap_fu, generate)

    @property
    def loss_metrics(self) -> set[str]:
        """Names of all that is measured without generating."""
        names = ["", *(f"{name}_" for name in self._sets if name)]
        return {f"{name}{metric}" for name in names for metric in LOSS_METRICS}

    def _adapted(self, model, generate):
        loras = {name: get_lora_state(model, name) for name in model.peft_config}
        digest = tensors_digest((f"{name} {key}", t) for name, state in loras.items() for key, t in state.items())
        return self._scores(f"{'full' if model is self.models.adap_fu else 'emulator'} {digest}", model, generate)

    def _scores(self, name, model, generate):
        """What is known of the model with its LoRAs, under a name that tells them, after measuring what is not."""
        known = self._known.setdefault(name, {})
        losses = not known
        texts = generate and len(self._metrics) > 0 and known.keys() <= self.loss_metrics
        if losses or texts:
            with ExitStack() as stack:
                if model is self.models.adap_fu:
                    stack.enter_context(self.models.whole_on(self.args.device))
                if name == ZERO_SHOT:
                    stack.enter_context(model.disable_adapter())
                known |= self._measure(model, losses, texts)
        return {metric: value for metric, value in known.items() if generate or metric in self.loss_metrics}

    def _measure(self, model, losses, texts):
        batch_size = self.args.per_device_eval_batch_size
        scores, completions = {}, {}
        with self.accelerator.autocast(), runnable(model, self.accelerator):
            if losses:
                scores = {
                    name: evaluate_loss(
                        model, tokens, self.data_collator, batch_size, self.accelerator, self.on_progress
                    )
                    for name, tokens in self._sets.items()
                }
            if texts:
                completions = {
                    name: complete(
                        model,
                        metric.prompts,
                        self.processing_class,
                        batch_size,
                        self.args.eval_max_new_tokens,
                        self.accelerator,
                        self.on_progress,
                    )
                    for name, metric in self._metrics.items()
                }
        metrics = self._with_means(scores) if losses else {}
        for name, found_texts in completions.items():
            found = self._metrics[name].compute(found_texts, self.accelerator)
            metrics |= {f"{name}_{key}" if name else key: value for key, value in found.items()}
        return metrics

    def _with_means(self, scores: dict[str, dict[str, float]]) -> dict[str, float]:
        """The scores of each set by name, after their means over all tokens."""
        if scores.keys() == {""}:
            return scores[""]
        tokens = {name: int(trained_tokens(self._sets[name]).sum()) for name in scores}
        means = {
            metric: sum(scores[name][metric] * tokens[name] for name in scores) / sum(tokens.values())
            for metric in ("loss", "token_accuracy")
        }
        return means | {f"{name}_{metric}": value for name, found in scores.items() for metric, value in found.items()}
