"""Zero-shot, AdapEmu and AdapFu on held-out text."""

from collections.abc import Callable

import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..server.capture import OutputHead, capture, causal_lm, run_full_model
from ..server.split_model import SplitModel
from ..shared.losses import hidden_state_loss, masked_kl
from ..shared.processes import deal, runnable, shards_parameters
from ..shared.round_trainer import RoundTrainer
from .passes import batches_by_length, complete, evaluate_loss
from .text_metric import LOSS_METRICS, TextMetric


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
            OutputHead(causal_lm(models.adap_fu)).check(models, self.args.device)
        self.models, self.text_metric = models, text_metric
        self.processing_class = trainer.processing_class
        self.data_collator = DataCollatorForLanguageModeling(self.processing_class.pad_token_id)
        self.accelerator = trainer.accelerator
        self.tokens, _ = trainer.prepare(dataset, "`eval_dataset`", packing=False)
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self._zero_shot: dict[str, float] = {}

    def remember_zero_shot(self, scores: dict[str, float] | None):
        """Take [`zero_shot`]'s result from an earlier run."""
        self._zero_shot = dict(scores or {})

    def zero_shot(self, generate: bool = False) -> dict[str, float]:
        """The full model without any LoRA. Computed once."""
        full = self.models.adap_fu
        if not self._zero_shot or (generate and self._zero_shot.keys() == LOSS_METRICS):
            with self.models.whole_on(self.args.device), full.disable_adapter():
                self._zero_shot = self._evaluate(full, generate)
        return self._zero_shot

    def adapted(self, generate: bool = False) -> dict[str, dict[str, float]]:
        """`adap_emu` (emulator + adapter layers) and `adap_fu` (full model + adapter layers) as of now."""
        adap_emu = self._evaluate(self.models.adap_emu, generate)
        with self.models.whole_on(self.args.device):
            return {"adap_emu": adap_emu, "adap_fu": self._evaluate(self.models.adap_fu, generate)}

    @torch.no_grad()
    def drift(self) -> dict[str, float]:
        """
        How far the emulator is from the full model on this text, as of now.

        Returns:
            `dict[str, float]`: `drift_l2` and `drift_kl`, the two terms of the alignment loss: means over all tokens.
        """
        models, split, totals = self.models, self.models.split, torch.zeros(3, dtype=torch.float64)
        head, emulator = OutputHead(causal_lm(models.adap_fu)), models.adap_emu.eval()
        batches = batches_by_length(self.tokens["input_ids"], self.args.per_device_eval_batch_size)
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
            metrics = evaluate_loss(
                model, self.tokens, self.data_collator, batch_size, self.accelerator, self.on_progress
            )
            if generate:
                prompts, max_new_tokens = self.text_metric.prompts, self.args.eval_max_new_tokens
                completions = complete(
                    model,
                    prompts,
                    self.processing_class,
                    batch_size,
                    max_new_tokens,
                    self.accelerator,
                    self.on_progress,
                )
        if generate:
            metrics |= self.text_metric.compute(completions, self.accelerator)
        return metrics
