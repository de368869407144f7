"""The data side: local steps on private text."""

import itertools
import zlib
from contextlib import contextmanager

import torch
from datasets import Dataset
from peft import PeftModel

from .config import FedBiOTConfig
from .lora import CLIENT, EMULATOR, get_lora_state, load_lora, lora_factors, save_lora, set_lora_state
from .losses import proximal_term
from .package import EmulatorPackage
from .payload import ClientUpdate, RoundStart, check_lora
from .sharding import gathered, is_sharded, release_whole
from .trainer import RoundTrainer


class ClientSFTTrainer(RoundTrainer):
    """
    An [`~trl.SFTTrainer`] of the client LoRA: TRL's loss plus the proximal term.

    Each `train()` call takes `args.local_steps` steps from the client LoRA as it is then, which is also the point that
    the proximal term holds it near. The emulator LoRA and all weights of the model stay frozen.

    Args:
        model (`str`, [`EmulatorPackage`] or [`~peft.PeftModel`]):
            An emulator package (a folder or loaded), or a model with both LoRAs on it.
        args ([`FedBiOTConfig`]):
            Configuration.
        train_dataset ([`~datasets.Dataset`]):
            Private text, in any form that [`~trl.SFTTrainer`] takes.
        **kwargs:
            As for [`~trl.SFTTrainer`], `optimizers` and `peft_config` excepted.
    """

    adapter = CLIENT
    _tag_names = ["trl", "sft", "fedbiot"]

    def __init__(
        self, model: str | EmulatorPackage | PeftModel, args: FedBiOTConfig, train_dataset: Dataset, **kwargs
    ):
        self.package = None
        if isinstance(model, str):
            self.package = EmulatorPackage.load(model, **args.init_kwargs())
        elif isinstance(model, EmulatorPackage):
            self.package = model
        if self.package is not None:
            model = self.package.peft_model()
        args = args.client_arguments()
        args.model_init_kwargs = None
        super().__init__(model, args, args.num_rounds * args.local_steps, train_dataset, **kwargs)
        self._reference: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train(self, *args, **kwargs):
        with self._factors() as (factors, _):
            self._reference = [(a.detach().clone(), b.detach().clone()) for a, b in factors]
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss
        loss, outputs = loss if return_outputs else (loss, None)
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        self.record("sft_loss", loss.detach() * steps)
        if self.args.proximal_weight > 0:
            with self._factors() as (factors, scalings):
                distance = proximal_term(factors, self._reference, scalings)
            self.record("proximal_term", distance.detach())
            loss = loss + self.args.proximal_weight / 2 * distance / steps
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _factors(self):
        """[`lora_factors`] of the client LoRA, whole."""
        factors, scalings = lora_factors(self.model, CLIENT)
        if not all(map(is_sharded, itertools.chain(*factors))):
            release_whole(self.model)
            factors, scalings = lora_factors(self.model, CLIENT)
        with gathered(itertools.chain(*factors)) as tensors:
            yield list(zip(tensors[::2], tensors[1::2], strict=True)), scalings

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the client LoRA as a PEFT folder for the emulator package."""
        config = self.model.peft_config[CLIENT]
        save_lora(output_dir or self.args.output_dir, config, get_lora_state(self.model, CLIENT), base_model=None)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _, state = load_lora(resume_from_checkpoint)
        set_lora_state(self.model, CLIENT, state)


class FederatedClient:
    """
    One data owner. It sees the emulator package and [`RoundStart`] payloads, and gives [`ClientUpdate`] payloads.

    Args:
        name (`str`): Name of the client, unique in the federation.
        trainer ([`ClientSFTTrainer`]): Does the local steps. Simulated clients share one; nothing of a client stays
            in it between two calls of [`fit`].
        train_dataset ([`~datasets.Dataset`]): The client's private text.

    Raises:
        ValueError: If the dataset is empty or holds nothing to train on.
    """

    def __init__(self, name: str, trainer: ClientSFTTrainer, train_dataset: Dataset):
        self.name = name
        self.trainer = trainer
        self.num_examples = len(train_dataset)
        self.train_dataset = trainer.prepare(train_dataset, f"client '{name}'")
        self.steps_done = 0

    def fit(self, payload: bytes | RoundStart, server_round: int) -> bytes | ClientUpdate:
        """
        Train for one round.

        Args:
            payload (`bytes` or [`RoundStart`]): What the server sent. The answer has the same form.
            server_round (`int`): The round that the client expects.

        Returns:
            `bytes` or [`ClientUpdate`]: The client LoRA after `local_steps` steps.

        Raises:
            PayloadError: If the payload is damaged, from another round, or not for this emulator.
        """
        on_wire = isinstance(payload, bytes)
        start = RoundStart.from_bytes(payload, server_round) if on_wire else payload
        trainer = self.trainer
        check_lora("client LoRA", start.client_lora, get_lora_state(trainer.model, CLIENT))
        check_lora("emulator LoRA", start.emulator_lora, get_lora_state(trainer.model, EMULATOR))
        set_lora_state(trainer.model, CLIENT, start.client_lora)
        set_lora_state(trainer.model, EMULATOR, start.emulator_lora)

        trainer.train_dataset = self.train_dataset
        trainer.steps_done = self.steps_done
        # The schedule follows the rounds of the federation, in which this client may not always take part.
        trainer.schedule_start = (server_round - 1) * trainer.args.local_steps
        trainer.train(seed=zlib.crc32(f"{trainer.args.seed}/{self.name}/{server_round}".encode()))
        self.steps_done = trainer.steps_done

        losses = trainer.step_metrics["sft_loss"]
        metrics = {"loss": sum(losses) / len(losses)}
        if trainer.step_metrics["proximal_term"]:
            metrics["proximal_term"] = trainer.step_metrics["proximal_term"][-1]
        update = ClientUpdate(
            server_round, self.name, self.num_examples, metrics, get_lora_state(trainer.model, CLIENT)
        )
        return update.to_bytes() if on_wire else update
