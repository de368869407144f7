"""The owner side: the full model, the alignment, the average."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..config import FedBiOTConfig
from ..config.settings import AlignmentSettings
from ..shared.arguments import check_args
from ..shared.lora_state import (
    CLIENT,
    EMULATOR,
    LoraState,
    get_lora_state,
    save_lora,
    scaled,
    set_lora_state,
    traveling,
)
from ..shared.processes import is_sharded
from ..shared.tokenizers import prepare_tokenizer
from ..wire.messages import ClientUpdate, LocalWork, PayloadError, RoundStart, RoundStarts
from ..wire.package import EmulatorPackage
from .aggregation import Aggregate, make_aggregator
from .alignment import EmulatorAlignmentTrainer
from .plug_in import PlugInTrainer
from .split_check import check_split
from .split_model import SplitModel
from .teachers import OnProgress


logger = logging.get_logger(__name__)

DOMINANT_SHARE = 0.9  # of the weight of three clients or more, from which on one of them owns the average


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
        num_examples (`dict[str, int]`): How many examples each client has said that it holds, in its last update.
        plug_in_lora (`dict[str, torch.Tensor]`, *optional*): What the full model has in place of the client LoRA, with its
            keys, once that was learned ([`learn_plug_in`]).
        plug_in_scale (`float`): Factor of the client LoRA in the full model, and there alone.

    Raises:
        ValueError: If alignment is on and there is no public dataset, the model cannot be split, or a client's rank is
            larger than the client LoRA's.
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
        check_args(args)
        self.args = args
        self.processing_class = prepare_tokenizer(processing_class, args)
        self.models = SplitModel.from_config(model, args, peft_config, emulator_peft_config, args.computes_start)
        self.models.align_tokens(self.processing_class, args)
        self.client_lora = get_lora_state(self.models.adap_emu, CLIENT)
        self.emulator_lora = get_lora_state(self.models.adap_emu, EMULATOR)
        self.client_steps: dict[str, int] = {}
        self.num_examples: dict[str, int] = {}
        self.plug_in_lora: LoraState | None = None
        self.plug_in_scale = 1.0
        check_client_ranks(args.ranks, self.models.adap_emu.peft_config[CLIENT])
        self.models.move(args.device, args.offload_full_model)
        self.aggregator = make_aggregator(args)
        self._received: set[str] = set()
        self._dominant: set[str] = set()
        self.trainer = self.plug_in_trainer = None
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
            if args.plug_in_steps > 0:
                self.plug_in_trainer = PlugInTrainer(self.trainer, args, public_dataset, processing_class)
        elif self.models.split.dropped and not any(map(is_sharded, model.parameters())):
            check_split(self.models, args.device, cached=False)  # the trainer does it otherwise

    def install_loras(self):
        """Put the server's state of both LoRAs into the modules, the client LoRA into the full model as well."""
        set_lora_state(self.models.adap_emu, CLIENT, self.client_lora)
        set_lora_state(self.models.adap_emu, EMULATOR, self.emulator_lora)
        self.models.plug_in(self.plugged_in())

    def plugged_in(self) -> LoraState:
        """The client LoRA as the full model has it, with the emulator's keys."""
        return scaled(self.client_lora if self.plug_in_lora is None else self.plug_in_lora, self.plug_in_scale)

    @property
    def alignment_steps(self) -> int:
        """Alignment steps taken so far."""
        return 0 if self.trainer is None else self.trainer.steps_done

    @alignment_steps.setter
    def alignment_steps(self, steps: int):
        if self.trainer is not None:
            self.trainer.steps_done, self.trainer.initialized = steps, True

    def initialize_alignment(self, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Compute the emulator LoRA's start, if it is not to start without effect. Returns what came of it."""
        if self.trainer is None:
            return {}
        self.install_loras()
        metrics = self.trainer.initialize(on_progress)
        self.emulator_lora = get_lora_state(self.models.adap_emu, EMULATOR)
        return metrics

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

    def learn_plug_in(self) -> list[float]:
        """
        Let the client LoRA learn, in the full model, what it does in the emulator: `args.plug_in_steps` steps of
        [`PlugInTrainer`]. The clients' stays as it is.

        Returns:
            `list[float]`: The KL divergence at each step, in nats per token. Empty if no layer is dropped.
        """
        if self.plug_in_trainer is None:
            return []
        self.plug_in_lora, self.plug_in_trainer.steps_done = None, 0
        self.install_loras()
        self.plug_in_trainer.take_steps(self.args.plug_in_steps)
        self.plug_in_lora = self.models.extract()
        return self.plug_in_trainer.step_metrics["plug_in_kl"]

    def package(self) -> EmulatorPackage:
        """What a client needs once, with the LoRAs as of now."""
        return self.models.package(self.client_lora, self.emulator_lora)

    def begin_round(self, received: Iterable[str] = ()):
        """Open a round: from here on updates are for it. After a resume, some clients' may have been received."""
        self.aggregator.begin(self._traveling())
        self._received = set(received)

    def discard_round(self):
        """Close a round without an average. Its clients will take the same steps again."""
        self.begin_round()

    def start_round(self, server_round: int, names: Sequence[str]) -> RoundStarts:
        """The payload of each client of a round, by name."""
        works = {name: self._work(name, server_round) for name in names}
        smaller = {name: self._traveling(name) for name in self.args.ranks}
        return RoundStarts(server_round, works, self._traveling(), self.emulator_lora, smaller)

    def _traveling(self, name: str | None = None) -> LoraState:
        """The part of the client LoRA that is exchanged with a client, or with those of the full rank."""
        rank = None if name is None else self.args.ranks.get(name)
        return traveling(self.client_lora, self.args.freeze_a, rank)

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
        start = RoundStart(0, self._work("", 1), self._traveling(), self.emulator_lora)
        update = ClientUpdate(0, "", 1, {}, self._traveling())
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
        update = ClientUpdate.from_bytes(reply, server_round, client_lora=self._traveling(client))
        if update.client != client:
            raise PayloadError(f"The client update is signed by client '{update.client}'.")
        if client in self._received:
            raise PayloadError(f"Client '{client}' has sent an update in this round already.")
        self.aggregator.add(update)
        self._received.add(client)
        self.num_examples[client] = update.num_examples
        return update.metrics

    def aggregate(self) -> Aggregate:
        """Close the round: what comes of its updates is the next client LoRA."""
        aggregate = self.aggregator.finish()
        for client in self._received:
            self.client_steps[client] = self.client_steps.get(client, 0) + self.args.local_steps
        self.client_lora = self.client_lora | aggregate.client_lora  # of a frozen A, nothing comes
        for client, share in aggregate.weights.items():
            if share > DOMINANT_SHARE and len(aggregate.weights) > 2 and client not in self._dominant:
                self._dominant.add(client)
                logger.warning(
                    f"Client '{client}' has {share:.1%} of the weight of {len(aggregate.weights)} clients, by the number "
                    "of examples that it says it holds. Cap what one client can have with `max_client_share`, or set "
                    "`aggregation_weights='uniform'`."
                )
        return aggregate

    def save_tokenizer(self, folder: str | Path):
        """Write what belongs to the full model with the client LoRA: tokenizer, chat template, end tokens."""
        self.processing_class.save_pretrained(folder)
        self.models.adap_fu.generation_config.save_pretrained(folder)

    def save_client_lora(self, folder: str | Path, model_name: str | None):
        """Write the client LoRA as a PEFT folder for the full model, with its layer indices, as strong as it is there."""
        state = self.models.split.to_full(self.plugged_in())
        save_lora(folder, self.models.adap_fu.peft_config[CLIENT], state, model_name)


def check_client_ranks(ranks: Mapping[str, int], config: LoraConfig):
    """Raise `ValueError` if a client's rank is no part of the LoRA's."""
    if ranks and config.init_lora_weights == "orthogonal":
        raise ValueError(
            "`client_ranks` is set, but `init_lora_weights` is 'orthogonal' in `peft_config`: the whole LoRA starts as a zero "
            "update then, its first ranks do not. Use True or 'gaussian'."
        )
    for name, rank in ranks.items():
        if rank > config.r:
            raise ValueError(
                f"`client_ranks` gives client '{name}' rank {rank}, but the client LoRA has rank {config.r} (`r` in "
                "`peft_config`), of which clients have a part. Raise that, or lower the client's."
            )


def check_public_dataset(public_dataset: Dataset | None, settings: AlignmentSettings):
    """Raise `ValueError` if there is no text for the alignment that `settings` ask for."""
    if public_dataset is None or len(public_dataset) == 0:
        raise ValueError(
            f"`public_dataset` is {'None' if public_dataset is None else 'empty'}, but the emulator is aligned on public "
            f"text (`initial_alignment_steps` is {settings.initial_alignment_steps}, `alignment_steps` is "
            f"{settings.alignment_steps}, `alignment_init` is '{settings.alignment_init}'). Pass public text, or set both to 0 and "
            "the last one to 'zero'."
        )
