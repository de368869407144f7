"""Whether the public text covers the clients': by the emulator's loss on both before any client has trained."""

from collections.abc import Mapping

from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..server.split_model import SplitModel
from ..server.teachers import OnProgress
from ..shared.processes import runnable
from ..shared.round_trainer import RoundTrainer
from ..shared.text_loss import evaluate_loss


# What tells is how far the emulator is behind the full model on a client's text, which the full model never reads. So its
# loss there is taken to be that on held-out private text, or, without any, on public text. The emulator may be behind it by
# this much, in nats per token.
COVERAGE_MARGIN = 2.0
EMULATOR_LOSS, FULL_LOSS = "public_emulator_loss", "public_full_loss"


class PublicLoss:
    """
    Loss of the emulator and of the full model without any client LoRA, on public text as clients would train on it.

    Args:
        models ([`SplitModel`]): The models. Whoever measures loads the LoRAs first.
        trainer ([`RoundTrainer`]): The clients', which tells what has a label.
        tokens (`Dataset`): Public text, tokenized by it.
    """

    def __init__(self, models: SplitModel, trainer: RoundTrainer, tokens: Dataset):
        self.models, self.args, self.accelerator, self.tokens = models, trainer.args, trainer.accelerator, tokens
        self.data_collator = DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
        self.on_progress: OnProgress = lambda done, total: None

    def measure(self) -> dict[str, float]:
        """`public_emulator_loss` with the LoRAs as they are now, and `public_full_loss`, in nats per token."""
        full = self.models.adap_fu
        losses = {EMULATOR_LOSS: self._of(self.models.adap_emu)}
        with self.models.whole_on(self.args.device), full.disable_adapter():
            return losses | {FULL_LOSS: self._of(full)}

    def _of(self, model) -> float:
        batch_size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast(), runnable(model, self.accelerator):
            return evaluate_loss(
                model, self.tokens, self.data_collator, batch_size, self.accelerator, self.on_progress
            )["loss"]


def why_uncovered(client_loss: float, public: Mapping[str, float], held_out_loss: float | None = None) -> str | None:
    """
    What tells that the public text does not cover a client's, in words; `None` if nothing does.

    Args:
        client_loss (`float`): The emulator's loss on the client's text before any step of it, in nats per token.
        public (`dict[str, float]`): What [`PublicLoss`] measured after the initial alignment, if anything.
        held_out_loss (`float`, *optional*): The full model's on held-out private text, as it came.
    """
    emulator = public.get(EMULATOR_LOSS)
    if emulator is None or not client_loss > max(emulator, held_out_loss or 0.0) + COVERAGE_MARGIN:
        return None
    held_out = "" if held_out_loss is None else f", and {held_out_loss:.3g} on held-out text"
    return (
        f"the emulator's loss on it is {client_loss:.3g} before any training, {emulator:.3g} on the public text, where "
        f"the full model's is {public[FULL_LOSS]:.3g}{held_out}"
    )
