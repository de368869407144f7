"""The owner side: the full model, the alignment, the average."""

from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .aggregation import FederatedAverage
from .alignment import EmulatorAlignmentTrainer, split_model
from .config import FedBiOTConfig
from .lora import CLIENT, EMULATOR, get_lora_state, save_lora, set_lora_state
from .package import EmulatorPackage
from .payload import ClientUpdate, PayloadError, RoundStart, check_lora


class FederatedServer:
    """
    The model owner. It keeps the state of both LoRAs and turns client updates into the next client LoRA.

    Args:
        model (`PreTrainedModel`): The full model. Its tensors are shared, not copied, and stay as they are.
        args ([`FedBiOTConfig`]): Configuration.
        public_dataset ([`~datasets.Dataset`], *optional*): Public text for the alignment.
        processing_class (`PreTrainedTokenizerBase`): The model's tokenizer.
        peft_config, emulator_peft_config ([`~peft.LoraConfig`], *optional*): The two LoRAs.

    Attributes:
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): The LoRAs as of now, on the CPU. What the modules hold
            between two calls has no meaning.

    Raises:
        ValueError: If alignment is on and there is no public dataset, or the model cannot be split.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: FedBiOTConfig,
        public_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
    ):
        self.args = args
        self.processing_class = processing_class
        self.split_model = split_model(model, args, peft_config, emulator_peft_config)
        self.client_lora = get_lora_state(self.split_model.emulator, CLIENT)
        self.emulator_lora = get_lora_state(self.split_model.emulator, EMULATOR)
        self.split_model.move(args.device, args.offload_full_model)
        self.average, self.received = FederatedAverage(), set()
        self.trainer = None
        # An emulator that drops nothing is the full model already.
        if args.aligns and self.split_model.split.dropped:
            check_public_dataset(public_dataset, args)
            self.trainer = EmulatorAlignmentTrainer(
                self.split_model,
                args,
                public_dataset,
                total_steps=args.initial_alignment_steps + args.num_rounds * args.alignment_steps,
                processing_class=processing_class,
            )

    def load(self):
        """Put the server's state of both LoRAs into the modules, the client LoRA into the full model as well."""
        set_lora_state(self.split_model.emulator, CLIENT, self.client_lora)
        set_lora_state(self.split_model.emulator, EMULATOR, self.emulator_lora)
        self.split_model.plug_in(self.client_lora)

    def align(self, num_steps: int) -> dict[str, float]:
        """
        Take `num_steps` alignment steps.

        Returns:
            `dict[str, float]`: `alignment_l2` and, with a KL weight, `alignment_kl`: means over the last ten steps.
            Empty if no step is taken or no layer is dropped.
        """
        if num_steps == 0 or self.trainer is None:
            return {}
        self.load()
        self.trainer.take_steps(num_steps)
        self.emulator_lora = get_lora_state(self.split_model.emulator, EMULATOR)
        return {name: sum(values[-10:]) / len(values[-10:]) for name, values in self.trainer.step_metrics.items()}

    def package(self) -> EmulatorPackage:
        """What a client needs once, with the LoRAs as of now."""
        return EmulatorPackage.of(self.split_model, self.client_lora, self.emulator_lora)

    def start_round(self, server_round: int) -> bytes | RoundStart:
        """Open a round. Returns the payload for each of its clients."""
        self.average, self.received = FederatedAverage(), set()
        start = RoundStart(server_round, self.client_lora, self.emulator_lora)
        return start.to_bytes() if self.args.use_wire_format else start

    def payload_sizes(self) -> tuple[int, int]:
        """Bytes of a round's payload to a client and of its answer (up to its name and metrics)."""
        start = RoundStart(0, self.client_lora, self.emulator_lora)
        update = ClientUpdate(0, "", 1, {}, self.client_lora)
        return len(start.to_bytes()), len(update.to_bytes())

    def receive(self, server_round: int, client: str, reply: bytes | ClientUpdate) -> dict[str, float]:
        """
        Check a client's answer and add it to the round's average.

        Returns:
            `dict[str, float]`: The client's metrics.

        Raises:
            PayloadError: If it is damaged, from another round or client, of the wrong shape, not finite, or the
                client's second. It is not used then.
        """
        update = ClientUpdate.from_bytes(reply, server_round) if isinstance(reply, bytes) else reply
        update.check(server_round)
        if update.client != client:
            raise PayloadError(f"it is signed by client '{update.client}'")
        if client in self.received:
            raise PayloadError(f"client '{client}' has sent an update in this round already")
        check_lora("client LoRA", update.client_lora, self.client_lora)
        self.average.add(update)
        self.received.add(client)
        return update.metrics

    def aggregate(self):
        """Close the round: the average of the updates received is the next client LoRA. None leaves it as it is."""
        if self.received:
            self.client_lora = self.average.result()

    def save_client_lora(self, folder: str | Path, model_name: str | None):
        """Write the client LoRA as a PEFT folder for the full model, with the full model's layer indices."""
        state = self.split_model.split.to_full(self.client_lora)
        save_lora(folder, self.split_model.full.peft_config[CLIENT], state, model_name)


def check_public_dataset(public_dataset: Dataset | None, args: FedBiOTConfig):
    """Raise `ValueError` if there is no text for the alignment that `args` ask for."""
    if public_dataset is None or len(public_dataset) == 0:
        raise ValueError(
            f"`public_dataset` is {'None' if public_dataset is None else 'empty'}, but the emulator is aligned on public "
            f"text (`initial_alignment_steps` is {args.initial_alignment_steps}, `alignment_steps` is "
            f"{args.alignment_steps}). Pass public text, or set both to 0."
        )
