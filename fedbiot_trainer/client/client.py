"""The data side of a round: a payload in, local steps on private text, a payload out."""

import math

import torch
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..shared.lora_state import CLIENT, EMULATOR, LoraState, arrived, get_lora_state, set_lora_state, traveling
from ..shared.processes import runnable
from ..shared.text_loss import evaluate_loss
from ..shared.texts import draw_texts
from ..wire.messages import ClientUpdate, RoundStart, check_client_name
from .trainer import ClientSFTTrainer


class FederatedClient:
    """
    One data owner. It sees the emulator package and [`RoundStart`] payloads, and gives [`ClientUpdate`] payloads. It
    keeps nothing between rounds: what it needs of earlier ones is in the payload.

    Args:
        name (`str`): Name of the client, unique in the federation, of printable characters.
        trainer ([`ClientSFTTrainer`]): Does the local steps. Simulated clients share one; nothing of a client stays
            in it between two calls of [`fit`].
        train_dataset ([`~datasets.Dataset`]): The client's private text.
        rank (`int`, *optional*): Rank of this client's LoRA, if it is smaller than that of the package.

    Attributes:
        num_examples (`int`): Rows of it that have a token to train on: the client's weight in the average.
        train_dataset ([`~datasets.Dataset`]): These, tokenized.

    Raises:
        TypeError, ValueError: If the name cannot be used, or the dataset is no text or holds nothing to train on.
    """

    def __init__(self, name: str, trainer: ClientSFTTrainer, train_dataset: Dataset, rank: int | None = None):
        check_client_name(name)
        self.name = name
        self.trainer = trainer
        self.rank = rank
        self.train_dataset, self.num_examples = trainer.prepare(train_dataset, f"client '{name}'")

    def fit(self, start: bytes) -> bytes:
        """
        Train for one round.

        Args:
            start (`bytes`): A [`RoundStart`].

        Returns:
            `bytes`: A [`ClientUpdate`] with the client LoRA after the steps that were ordered.

        Raises:
            PayloadError: If the payload is damaged, or not for this emulator.
        """
        trainer = self.trainer
        order = RoundStart.from_bytes(
            start,
            client_lora=self._traveling(trainer.package_lora),
            emulator_lora=get_lora_state(trainer.model, EMULATOR),
        )
        set_lora_state(trainer.model, EMULATOR, order.emulator_lora)
        zero_shot = self._zero_shot_loss() if order.work.first_step == 0 and order.emulator_lora else None
        set_lora_state(trainer.model, CLIENT, arrived(order.client_lora, trainer.package_lora))

        trainer.train_dataset = self.train_dataset
        trainer.follow(order.work)

        losses = trainer.step_metrics["sft_loss"]
        metrics = {"loss": sum(losses) / len(losses)}
        if trainer.step_metrics["proximal_term"]:
            metrics["proximal_term"] = trainer.step_metrics["proximal_term"][-1]
        if zero_shot is not None:
            metrics["zero_shot_loss"] = zero_shot
        client_lora = self._traveling(get_lora_state(trainer.model, CLIENT))
        return ClientUpdate(order.server_round, self.name, self.num_examples, metrics, client_lora).to_bytes()

    def _zero_shot_loss(self) -> float | None:
        """
        The emulator's loss on some of the client's text, without any client LoRA: whether the public text has taught it
        to follow the full model there. `None` if it is not to be reported, or not finite.
        """
        trainer = self.trainer
        number = trainer.args.client_zero_shot_examples
        if number == 0:
            return None
        nothing = {key: torch.zeros_like(tensor) for key, tensor in trainer.package_lora.items()}
        set_lora_state(trainer.model, CLIENT, nothing)
        texts = draw_texts(self.train_dataset, number, trainer.args.seed)
        collator = DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id)
        with trainer.accelerator.autocast(), runnable(trainer.model, trainer.accelerator):
            batch_size = trainer.args.per_device_eval_batch_size
            loss = evaluate_loss(trainer.model, texts, collator, batch_size, trainer.accelerator)["loss"]
        return loss if math.isfinite(loss) else None

    def _traveling(self, client_lora: LoraState) -> LoraState:
        return traveling(client_lora, self.trainer.args.freeze_a, self.rank)
