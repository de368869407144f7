"""The trainer of a client: TRL's supervised fine-tuning of the client LoRA, held near its starting point."""

import itertools
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel

from ..config import FedBiOTConfig
from ..shared.arguments import check_args, model_or_name
from ..shared.compat import labels_alone
from ..shared.lora_state import CLIENT, get_lora_state, load_lora, lora_factors, save_lora, set_lora_state
from ..shared.processes import gathered, is_sharded, release_whole
from ..shared.round_trainer import RoundTrainer
from ..wire.messages import LocalWork
from ..wire.package import EmulatorPackage
from .proximal import proximal_term


README = """\
---
library_name: peft
tags: [fedbiot, lora]
---

# Client LoRA of one client, for an emulator package

It sits on the layers {layers} of an emulator package of {number} layers. In the full model, which has more layers, these
are others: loaded there as it is, it would land on the wrong ones. With the package that it was trained in,

    fedbiot merge THIS_FOLDER adap_emu --package PACKAGE
    fedbiot merge THIS_FOLDER adap_fu --package PACKAGE --base_model FULL_MODEL

make AdapEmu and AdapFu of it as plain models. The second one moves it to the full model's layers.
"""


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

    Attributes:
        package_lora (`dict[str, torch.Tensor]`):
            The client LoRA as the emulator package had it: what a payload leaves out (`args.freeze_a`) is in it.
    """

    lora_name = CLIENT
    _tag_names = ["trl", "sft", "fedbiot"]

    def __init__(
        self, model: str | EmulatorPackage | PeftModel, args: FedBiOTConfig, train_dataset: Dataset, **kwargs
    ):
        check_args(args)
        model = model_or_name(model, EmulatorPackage, PeftModel, names="an emulator package's folder")
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
        self.package_lora = get_lora_state(self.model, CLIENT)
        self._reference: list[tuple[torch.Tensor, torch.Tensor]] = []

    def train(self, *args, **kwargs):
        with self._factors() as (factors, _):
            self._reference = [(a.detach().clone(), b.detach().clone()) for a, b in factors]
        return super().train(*args, **kwargs)

    def follow(self, work: LocalWork):
        """Take the steps that a server orders, from the LoRAs as they are now."""
        self.steps_done, self.schedule_start, self.total_steps = (
            work.first_step,
            work.schedule_step,
            work.schedule_length,
        )
        self.args.proximal_weight = work.proximal_weight
        self.take_steps(work.local_steps, seed=work.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with labels_alone():
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
        """
        Write the client LoRA as a PEFT folder for the emulator package, with a README.md that says so: its layer indices
        are the emulator's, not the full model's.
        """
        folder, config = output_dir or self.args.output_dir, self.model.peft_config[CLIENT]
        client_lora = get_lora_state(self.model, CLIENT)
        if self.args.should_save:
            save_lora(folder, config, client_lora, base_model=None)
            numbers = {int(number) for key in client_lora for number in re.findall(r"\.(\d+)\.", key)[:1]}
            layers = ", ".join(map(str, sorted(numbers)))
            number = self.model.config.get_text_config().num_hidden_layers
            Path(folder, "README.md").write_text(README.format(layers=layers, number=number))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _, state = load_lora(resume_from_checkpoint)
        set_lora_state(self.model, CLIENT, state)
