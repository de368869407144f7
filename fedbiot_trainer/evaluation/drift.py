"""How far the emulator is from the full model, on held-out text."""

from collections.abc import Mapping
from typing import cast

import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..server.capture import OutputHead, capture, causal_lm, run_full_model
from ..server.split_model import SplitModel
from ..server.teachers import OnProgress, distances
from ..shared.processes import deal, shards_parameters, summed
from ..shared.round_trainer import RoundTrainer
from ..shared.text_loss import batches_by_length
from ..shared.texts import IGNORED


class Drift:
    """
    The two terms of the alignment loss between the emulator and the full model.

    Args:
        models ([`SplitModel`]): The models. Whoever measures loads the LoRAs first.
        trainer ([`RoundTrainer`]): Tells batch size, padding and processes.
        texts (`dict[str, Dataset]`): Tokenized text with `input_ids` and `labels`, by what its values are called.

    Raises:
        ValueError: If the run's processes shard the models, or the logits are more than the output head.
    """

    def __init__(self, models: SplitModel, trainer: RoundTrainer, texts: Mapping[str, Dataset]):
        self.args, self.accelerator = trainer.args, trainer.accelerator
        if shards_parameters(self.accelerator):
            raise ValueError(
                "`eval_drift` is True, but it runs the emulator and the full model side by side, which is not implemented "
                "under DeepSpeed ZeRO-3 and FSDP2. Leave it out, or use DDP or ZeRO-2."
            )
        OutputHead(causal_lm(models.adap_fu)).check(models, self.args.device)
        self.models, self.texts = models, dict(texts)
        self.data_collator = DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
        self.on_progress: OnProgress = lambda done, total: None

    def measure(self) -> dict[str, float]:
        """
        Measure it as of now.

        Returns:
            `dict[str, float]`: Of each text, `<name>_l2` and `<name>_kl`: means over all tokens; `<name>_label_l2` and
            `<name>_label_kl`: over those at which a token with a label is predicted.
        """
        return {f"{name}_{key}": value for name, text in self.texts.items() for key, value in self._of(text).items()}

    @torch.no_grad()
    def _of(self, text: Dataset) -> dict[str, float]:
        models, split = self.models, self.models.split
        totals = torch.zeros(2, 3, dtype=torch.float64)  # L2, KL and tokens: at labels, and elsewhere
        head, adap_emu = OutputHead(causal_lm(models.adap_fu)), models.adap_emu.eval()
        batches = batches_by_length(text["input_ids"], self.args.per_device_eval_batch_size)
        with models.whole_on(self.args.device), self.accelerator.autocast(), head.whole() as logits:
            for rows, counts in deal(batches, self.accelerator, self.on_progress):
                batch = self.data_collator([text[i] for i in rows])
                inputs = {key: batch[key].to(self.accelerator.device) for key in ("input_ids", "attention_mask")}
                teacher = run_full_model(models, inputs)
                with capture(adap_emu, split.layers_name, split.top_position) as student:
                    causal_lm(adap_emu).base_model(**inputs, use_cache=False)
                for place, mask in enumerate(_masks(batch) if counts else ()):
                    if mask.any():
                        l2, kl = distances(student, teacher, mask.to(self.accelerator.device), logits)
                        totals[place] += torch.tensor([l2.item(), cast(torch.Tensor, kl).item(), mask.sum().item()])
        totals = summed(totals, self.accelerator)
        (l2, kl, tokens), (label_l2, label_kl, labels) = totals.sum(0).tolist(), totals[0].tolist()
        means = {"l2": l2 / tokens, "kl": kl / tokens}
        return means | {"label_l2": label_l2 / labels, "label_kl": label_kl / labels}


def _masks(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens after which one with a label comes, and all others, `(batch_size, sequence_length)` each."""
    at_labels = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    at_labels[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return at_labels, batch["attention_mask"].bool() & ~at_labels
