"""The server's last step: let the client LoRA do in the full model what it does in the emulator."""

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import FedBiOTConfig
from ..shared.lora_layers import without_effect
from ..shared.lora_state import CLIENT
from ..shared.losses import masked_kl
from ..shared.processes import shards_parameters
from .alignment import EmulatorAlignmentTrainer
from .capture import OutputHead, capture, causal_lm, run_full_model
from .public_text import PublicTextTrainer, text_of, without_dropout


class PlugInTrainer(PublicTextTrainer):
    r"""
    Trains the client LoRA of the full model on public text, towards the full model's own logits plus what the client LoRA
    changes in the emulator's:

    `loss = KL(softmax(full + emulator with the client LoRA - emulator without it) || softmax(full with the client LoRA))`

    a mean over the tokens that are not padding. What clients trained is right for their emulator; of three models that are
    all the owner's, this makes it right for the full one. The sum of logits is proxy-tuning (Liu et al., 2024), which
    runs three models for each token; here it is the teacher, and one model is left.

    The emulator's client LoRA stays as it is.

    Args:
        alignment ([`EmulatorAlignmentTrainer`]): Has the models, and shares its processes.
        args ([`FedBiOTConfig`]): Configuration. Learning rate, its warmup and the batch size are the alignment's.
        public_dataset ([`~datasets.Dataset`]): Public text.
        processing_class (`PreTrainedTokenizerBase`): The model's tokenizer.

    Raises:
        ValueError: If the run's processes shard the models, or the output head is not all that makes the logits.
    """

    lora_name = CLIENT

    def __init__(
        self,
        alignment: EmulatorAlignmentTrainer,
        args: FedBiOTConfig,
        public_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
    ):
        self.models, steps = alignment.models, args.plug_in_steps
        if shards_parameters(alignment.accelerator):
            raise ValueError(
                f"`plug_in_steps` is {steps}, but DeepSpeed ZeRO-3 and FSDP2 shard the full model and the emulator in turn, "
                "and its steps run both. Use DDP or ZeRO-2, or 0."
            )
        args = args.alignment_arguments()
        args.model_init_kwargs = None
        super().__init__(
            self.models.adap_fu,
            args,
            steps,
            public_dataset,
            share_accelerator=alignment,
            processing_class=processing_class,
        )
        self.head = OutputHead(causal_lm(self.models.adap_fu))
        self.head.check(self.models, args.device)

    def train(self, *args, **kwargs):
        with self.models.whole_on(self.args.device):
            try:
                return super().train(*args, **kwargs)
            finally:
                self.model.requires_grad_(False)
                self.model.eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask, split = inputs["attention_mask"], self.models.split
        teacher = self._teacher(text_of(inputs))
        student, outputs = self.run_student(model, inputs, split.layers_name, split.top_index)
        with self.head.whole() as logits:

            def proxy(states: torch.Tensor) -> torch.Tensor:
                full, after, before = states.chunk(3, dim=-1)
                return logits(full).add_(logits(after)).sub_(logits(before))

            kl = masked_kl(student.last, teacher, mask, logits, teacher_logits=proxy)
        loss = self.mean("plug_in_kl", kl, mask, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher(self, text: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Hidden states that enter the output head, `(batch_size, sequence_length, 3 * hidden_size)`: of the full model
        without the client LoRA, of the emulator with it and of the emulator without it.
        """
        full, emulator, split = self.models.adap_fu, self.models.adap_emu, self.models.split

        def run_emulator() -> torch.Tensor:
            with capture(emulator, split.layers_name, split.top_position) as seen:
                causal_lm(emulator).base_model(**text, use_cache=False)
            return seen.last

        with self.accelerator.autocast(), without_dropout(full), without_dropout(emulator):
            with without_effect(full, CLIENT):
                own = run_full_model(self.models, text).last
            after = run_emulator()
            with without_effect(emulator, CLIENT):
                before = run_emulator()
        return torch.cat([own, after, before], dim=-1)
