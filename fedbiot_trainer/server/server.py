"""The owner side: the full model, the alignment, the average."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import FedBiOTConfig
from ..shared.lora_state import CLIENT, EMULATOR, get_lora_state, save_lora, set_lora_state
from ..shared.processes import is_sharded
from ..wire.messages import ClientUpdate, LocalWork, PayloadError, RoundStart, RoundStarts
from ..wire.package import EmulatorPackage
from .aggregation import Aggregate, FederatedAverage
from .alignment import EmulatorAlignmentTrainer
from .split_check import check_split
from .split_model import SplitModel


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
        client_steps (`dict[str, int]`): Local steps that each client has taken so far, by name.

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
        self.models = SplitModel.from_config(model, args, peft_config, emulator_peft_config)
        self.client_lora = get_lora_state(self.models.adap_emu, CLIENT)
        self.emulator_lora = get_lora_state(self.models.adap_emu, EMULATOR)
        self.client_steps: dict[str, int] = {}
        self.models.move(args.device, args.offload_full_model)
        self.aggregator = FederatedAverage()
        self._received: set[str] = set()
        self._steps_before: dict[str, int] = {}
        self.trainer = None
        # An emulator that drops nothing is the full model already.
        if args.aligns and self.models.split.dropped:
            check_public_dataset(public_dataset, args)
            self.trainer = EmulatorAlignmentTrainer(
                self.models,
                args,
                public_dataset,
                total_steps=args.initial_alignment_steps + args.num_rounds * args.alignment_steps,
                processing_class=processing_class,
            )
        elif self.models.split.dropped and not any(map(is_sharded, model.parameters())):
            check_split(self.models, args.device, cached=False)  # the trainer does it otherwise

    def install_loras(self):
        """Put the server's state of both LoRAs into the modules, the client LoRA into the full model as well."""
        set_lora_state(self.models.adap_emu, CLIENT, self.client_lora)
        set_lora_state(self.models.adap_emu, EMULATOR, self.emulator_lora)
        self.models.plug_in(self.client_lora)

    @property
    def alignment_steps(self) -> int:
        """Alignment steps taken so far."""
        return 0 if self.trainer is None else self.trainer.steps_done

    @alignment_steps.setter
    def alignment_steps(self, steps: int):
        if self.trainer is not None:
            self.trainer.steps_done = steps

    def align(self, num_steps: int) -> dict[str, float]:
        """
        Take `num_steps` alignment steps.

        Returns:
            `dict[str, float]`: `alignment_l2` and, with a KL weight, `alignment_kl`: means over the last ten steps.
            Empty if no step is taken or no layer is dropped.
        """
        if num_steps == 0 or self.trainer is None:
            return {}
        self.install_loras()
        self.trainer.take_steps(num_steps)
        self.emulator_lora = get_lora_state(self.models.adap_emu, EMULATOR)
        return {name: sum(values[-10:]) / len(values[-10:]) for name, values in self.trainer.step_metrics.items()}

    def package(self) -> EmulatorPackage:
        """What a client needs once, with the LoRAs as of now."""
        return self.models.package(self.client_lora, self.emulator_lora)

    def begin_round(self):
        """Open a round: from here on updates are for it."""
        self.aggregator.begin(self.client_lora)
        self._received, self._steps_before = set(), dict(self.client_steps)

    def discard_round(self):
        """Close a round without an average: clients will take its steps again."""
        self.client_steps = self._steps_before

    def start_round(self, server_round: int, names: Sequence[str]) -> RoundStarts:
        """The payload of each client of a round, by name."""
        works = {name: self._work(name, server_round) for name in names}
        return RoundStarts(server_round, works, self.client_lora, self.emulator_lora)

    def _work(self, name: str, server_round: int) -> LocalWork:
        args = self.args
        return LocalWork(
            local_steps=args.local_steps,
            first_step=self.client_steps.get(name, 0),
            # The schedule follows the rounds of the federation, in which this client may not always take part.
            schedule_step=(server_round - 1) * args.local_steps,
            schedule_length=args.num_rounds * args.local_steps,
            proximal_weight=args.proximal_weight,
            seed=zlib.crc32(f"{args.seed}/{name}/{server_round}".encode()),
        )

    def payload_sizes(self) -> tuple[int, int]:
        """Bytes of a round's payload to a client and of its answer (up to its name and metrics)."""
        start = RoundStart(0, self._work("", 1), self.client_lora, self.emulator_lora)
        update = ClientUpdate(0, "", 1, {}, self.client_lora)
        return len(start.to_bytes()), len(update.to_bytes())

    def receive(self, server_round: int, client: str, reply: bytes) -> dict[str, float]:
        """
        Check a client's answer and add it to the round's average.

        Returns:
            `dict[str, float]`: The client's metrics.

        Raises:
            PayloadError: If it is damaged, from another round or client, of the wrong shape, not finite, or the
                client's second. It is not used then.
        """
        update = ClientUpdate.from_bytes(reply, server_round, client_lora=self.client_lora)
        if update.client != client:
            raise PayloadError(f"The client update is signed by client '{update.client}'.")
        if client in self._received:
            raise PayloadError(f"Client '{client}' has sent an update in this round already.")
        self.aggregator.add(update)
        self._received.add(client)
        self.client_steps[client] = self.client_steps.get(client, 0) + self.args.local_steps
        return update.metrics

    def aggregate(self) -> Aggregate:
        """Close the round: what comes of its updates is the next client LoRA."""
        aggregate = self.aggregator.finish()
        self.client_lora = aggregate.client_lora
        return aggregate

    def save_client_lora(self, folder: str | Path, model_name: str | None):
        """Write the client LoRA as a PEFT folder for the full model, with the full model's layer indices."""
        state = self.models.split.to_full(self.client_lora)
        save_lora(folder, self.models.adap_fu.peft_config[CLIENT], state, model_name)


def check_public_dataset(public_dataset: Dataset | None, args: FedBiOTConfig):
    """Raise `ValueError` if there is no text for the alignment that `args` ask for."""
    if public_dataset is None or len(public_dataset) == 0:
        raise ValueError(
            f"`public_dataset` is {'None' if public_dataset is None else 'empty'}, but the emulator is aligned on public "
            f"text (`initial_alignment_steps` is {args.initial_alignment_steps}, `alignment_steps` is "
            f"{args.alignment_steps}). Pass public text, or set both to 0."
        )
