"""The server's step: train the emulator LoRA on public text until the emulator behaves like the full model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .config import FedBiOTConfig
from .lora import CLIENT, EMULATOR, SplitModel, get_lora_state, load_lora, set_lora_state, with_rank
from .losses import hidden_state_loss, masked_kl
from .package import EmulatorPackage
from .trainer import RoundTrainer


class EmulatorAlignmentTrainer(RoundTrainer):
    r"""
    Trains the emulator LoRA so that emulator + adapter layers behave like the full model (paper, section 4.2):

    `loss = L2 + lambda * KL`, with L2 the relative squared distance between the hidden states that enter the adapter
    layers and KL the divergence between the output distributions, both averaged over the tokens that are not padding.
    The full model with the *current* client LoRA is the teacher. No dropout is active and nothing else is trained.

    Args:
        model (`str`, `PreTrainedModel` or [`SplitModel`]):
            The full model.
        args ([`FedBiOTConfig`]):
            Configuration. `train()` takes `initial_alignment_steps`.
        train_dataset ([`~datasets.Dataset`]):
            Public text, in any form that [`~trl.SFTTrainer`] takes. Prompts count like completions.
        peft_config ([`~peft.LoraConfig`], *optional*):
            The client LoRA. Not for a [`SplitModel`], which has one.
        emulator_peft_config ([`~peft.LoraConfig`], *optional*):
            The emulator LoRA. Defaults to `peft_config`, with rank `args.emulator_lora_r` if that is set.
        **kwargs:
            As for [`~trl.SFTTrainer`], `optimizers` excepted.
    """

    adapter = EMULATOR
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "fedbiot"]

    def __init__(
        self,
        model: str | PreTrainedModel | SplitModel,
        args: FedBiOTConfig,
        train_dataset: Dataset,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        if isinstance(model, SplitModel):
            if peft_config is not None or emulator_peft_config is not None:
                given = "peft_config" if peft_config is not None else "emulator_peft_config"
                raise ValueError(f"`{given}` was passed with a `SplitModel`, which has its LoRAs. Leave it out.")
        else:
            model = split_model(model, args, peft_config, emulator_peft_config)
        self.split_model = model
        self.full = model.full.to(args.device)
        args = args.alignment_arguments()
        args.model_init_kwargs = None
        total_steps = args.initial_alignment_steps + args.num_rounds * args.alignment_steps
        super().__init__(model.emulator, args, total_steps, train_dataset, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["attention_mask"]
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask, "use_cache": False}
        split = self.split_model.split
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            entering_states(self.full, split.layers_name, split.adapter_indices[0]) as teacher_states,
        ):
            teacher_logits = self.full(**inputs).logits
        with _no_dropout(model), entering_states(self.model, split.layers_name, len(split.kept)) as student_states:
            outputs = model(**inputs)

        num_tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        l2 = hidden_state_loss(student_states[0], teacher_states[0], mask) / num_tokens
        self.record("alignment_l2", l2.detach() * self.accelerator.num_processes)
        loss = l2
        if self.args.alignment_kl_weight > 0:
            kl = masked_kl(outputs.logits, teacher_logits, mask) / num_tokens
            self.record("alignment_kl", kl.detach() * self.accelerator.num_processes)
            loss = l2 + self.args.alignment_kl_weight * kl
        # `num_items_in_batch` counts the tokens of all processes, and DDP averages the gradients.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        # The loss is a mean over tokens that are not padding, whatever their labels.
        num_tokens = sum(batch["attention_mask"].sum() for batch in batch_samples).to(device)
        return self.accelerator.gather(num_tokens).sum()

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the emulator package."""
        emulator = self.split_model.emulator
        loras = get_lora_state(emulator, CLIENT), get_lora_state(emulator, EMULATOR)
        EmulatorPackage.of(self.split_model, *loras).save(output_dir or self.args.output_dir, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _, state = load_lora(Path(resume_from_checkpoint) / "emulator_lora")
        set_lora_state(self.model, EMULATOR, state)


def split_model(
    model: PreTrainedModel,
    args: FedBiOTConfig,
    peft_config: LoraConfig | None = None,
    emulator_peft_config: LoraConfig | None = None,
) -> SplitModel:
    """Split `model` as `args` says."""
    if args.emulator_lora_r is not None:
        emulator_peft_config = with_rank(emulator_peft_config or peft_config, args.emulator_lora_r)
    return SplitModel(model, args.num_adapter_layers, args.emulator_drop_ratio, peft_config, emulator_peft_config)


@contextmanager
def entering_states(model: PeftModel, layers_name: str, index: int) -> Iterator[list[torch.Tensor]]:
    """Collect the hidden states, `(batch_size, sequence_length, hidden_size)`, that enter decoder layer `index`."""
    states: list[torch.Tensor] = []

    def keep(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    layer = model.get_base_model().get_submodule(layers_name)[index]
    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield states
    finally:
        hook.remove()


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
