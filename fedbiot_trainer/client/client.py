"""The data side of a round: a payload in, local steps on private text, a payload out."""

from datasets import Dataset

from ..shared.lora_state import CLIENT, EMULATOR, LoraState, arrived, get_lora_state, set_lora_state, traveling
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
        set_lora_state(trainer.model, CLIENT, arrived(order.client_lora, trainer.package_lora))
        set_lora_state(trainer.model, EMULATOR, order.emulator_lora)

        trainer.train_dataset = self.train_dataset
        trainer.follow(order.work)

        losses = trainer.step_metrics["sft_loss"]
        metrics = {"loss": sum(losses) / len(losses)}
        if trainer.step_metrics["proximal_term"]:
            metrics["proximal_term"] = trainer.step_metrics["proximal_term"][-1]
        client_lora = self._traveling(get_lora_state(trainer.model, CLIENT))
        return ClientUpdate(order.server_round, self.name, self.num_examples, metrics, client_lora).to_bytes()

    def _traveling(self, client_lora: LoraState) -> LoraState:
        return traveling(client_lora, self.trainer.args.freeze_a, self.rank)
