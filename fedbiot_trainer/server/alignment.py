"""The server's step: train the emulator LoRA on public text until the emulator behaves like the full model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import FedBiOTConfig
from ..shared.arguments import check_args, model_or_name
from ..shared.lora_layers import folded_loras
from ..shared.lora_state import CLIENT, EMULATOR, get_lora_state, load_lora, set_lora_state
from ..shared.processes import is_zero3, runnable, shards_parameters
from ..shared.step_sampler import StepSampler
from ..shared.texts import without_labels
from ..wire.package import load_model
from .capture import OutputHead, causal_lm
from .closed_form import AddedLinear, find_added_linears, start_in_closed_form
from .public_text import PublicTextTrainer, without_dropout
from .split_check import check_split
from .split_model import SplitModel
from .teachers import PLACE, CachedTeacher, OnlineTeacher, OnProgress, Teacher, distances


logger = logging.get_logger(__name__)


class EmulatorAlignmentTrainer(PublicTextTrainer):
    r"""
    Trains the emulator LoRA so that emulator + adapter layers behave like the full model (paper, section 4.2):

    `loss = L2 + lambda * KL`, with L2 the relative squared distance between the hidden states that enter the adapter
    layers and KL the divergence between the output distributions, both averaged over the tokens that are not padding.
    The full model with the *current* client LoRA is the teacher. No dropout is active and nothing else is trained.

    What the full model makes of the public text below the adapter layers never changes. With `args.teacher="cached"` it
    is computed once, before the first step, and kept on disk for later runs; for the teacher, a step then runs the
    adapter layers alone.

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
            The emulator LoRA. Defaults to `peft_config`, with rank `args.emulator_lora_r` if that is set, and on what
            `args.alignment_init` needs as well.
        total_steps (`int`, *optional*):
            Steps over which the learning-rate schedule runs, if there will be more of them than `train()` takes.
        **kwargs:
            As for [`~trl.SFTTrainer`], `optimizers` excepted.

    Attributes:
        initialized (`bool`): Whether the emulator LoRA has its start; set it if it comes from elsewhere.
    """

    lora_name = EMULATOR

    def __init__(
        self,
        model: str | PreTrainedModel | SplitModel,
        args: FedBiOTConfig,
        train_dataset: Dataset,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        total_steps: int | None = None,
        **kwargs,
    ):
        check_args(args)
        model = model_or_name(model, PreTrainedModel, SplitModel)
        if isinstance(model, str):
            model = load_model(model, **args.init_kwargs())
        if isinstance(model, SplitModel):
            if peft_config is not None or emulator_peft_config is not None:
                given = "peft_config" if peft_config is not None else "emulator_peft_config"
                raise ValueError(f"`{given}` was passed with a `SplitModel`, which has its LoRAs. Leave it out.")
        else:
            model = SplitModel.from_config(model, args, peft_config, emulator_peft_config, args.computes_start)
        if not model.split.kept:
            raise ValueError(
                f"`num_adapter_layers` is {args.num_adapter_layers}, which takes all layers, so there is no emulator to "
                "align. Leave some layers to it."
            )
        self.models, given = model, args
        model.move(args.device, args.offload_full_model)
        args = args.alignment_arguments()
        args.model_init_kwargs = None
        super().__init__(model.adap_emu, args, total_steps or args.max_steps, without_labels(train_dataset), **kwargs)
        model.align_tokens(self.processing_class, given)
        self.head = OutputHead(causal_lm(model.adap_fu))  # FSDP2 shards the emulator's
        with runnable(model.adap_emu, self.accelerator):
            check_split(model, args.device, not is_zero3(self.accelerator), args.teacher == "cached")
            if args.alignment_kl_weight > 0:
                self.head.check(model, args.device)
        self.added_linears = self._find_added_linears()
        self.initialized = False
        if args.teacher == "cached":
            self.teacher: Teacher = CachedTeacher(
                model,
                self.args,
                self.accelerator,
                self.data_collator,
                self.train_dataset,
                self.step_sampler,
                self.total_steps,
                show_bar=not self.args.disable_tqdm,
            )
            self.train_dataset = self.teacher.dataset
        else:
            self.teacher = OnlineTeacher(model, self.accelerator, self.data_collator)
        self.data_collator = self.teacher.collate

    def prepare_teacher(self, on_progress: OnProgress | None = None):
        """
        Have the teacher ready for the run: a cached one opens its store and computes what it lacks. [`train`] does it too.

        Args:
            on_progress (callable, *optional*): Called with the numbers of texts done and to do. Defaults to a bar.

        Raises:
            OSError: If the disk is too full.
        """
        self.teacher.prepare(max(self.total_steps, self.steps_done + self.args.max_steps), on_progress)

    def _find_added_linears(self) -> dict[int, AddedLinear]:
        if not self.args.computes_start or not self.models.split.dropped:
            return {}
        found = find_added_linears(self.models, self.args.device)
        why = (
            f"in {type(causal_lm(self.models.adap_emu)).__name__} no linear with an emulator LoRA has an output that its layer "
            "adds to its own"
        )
        if not found and self.args.alignment_init == "closed_form":
            raise ValueError(f"`alignment_init` is 'closed_form', but {why}. Use 'auto' or 'zero'.")
        if not found:
            logger.warning(
                f"The emulator LoRA starts without effect: {why}. `alignment_init='zero'` asks for this, as in the paper."
            )
        return found

    def initialize(self, on_progress: OnProgress | None = None) -> dict[str, float]:
        """
        Compute the start of the emulator LoRA (`args.alignment_init`), once. [`train`] does it too.

        Args:
            on_progress (callable, *optional*): Called with the numbers of passes over a batch done and to do.

        Returns:
            `dict[str, float]`: What [`start_in_closed_form`] reports. Empty if the LoRA starts without effect.
        """
        if self.initialized or not self.added_linears:
            return {}
        self.initialized = True
        with self.models.whole_on(self.args.device):
            return start_in_closed_form(
                self.models, self.added_linears, self._some_texts(), self.accelerator, on_progress or (lambda *_: None)
            )

    def _some_texts(self) -> list[dict[str, torch.Tensor]]:
        """Padded batches of public text, of similar length within a batch, the longest first."""
        texts, kept, tokens = self.train_dataset.select_columns("input_ids"), [], 0
        for (row,) in StepSampler(len(texts), 1, self.args.seed, 0, len(texts)):
            kept.append(texts[row])
            tokens += len(kept[-1]["input_ids"])
            if tokens >= self.args.alignment_init_tokens:
                break
        kept.sort(key=lambda text: -len(text["input_ids"]))
        size = self.args.per_device_train_batch_size
        return [self.data_collator(kept[i : i + size]) for i in range(0, len(kept), size)]

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if PLACE not in self._signature_columns:
            self._signature_columns.append(PLACE)

    def train(self, *args, **kwargs):
        self.prepare_teacher()
        if self.args.teacher == "online":  # the cached one has the emulator's
            self.models.plug_in(get_lora_state(self.models.adap_emu, CLIENT))
        resumes = args[0] if args else kwargs.get("resume_from_checkpoint")
        if not resumes:
            self.initialize()
        with self.folded_client_lora():
            return super().train(*args, **kwargs)

    @contextmanager
    def folded_client_lora(self) -> Iterator[None]:
        """Run the adapter layers without the detour of their LoRA, which alignment leaves as it is, where it can be."""
        with ExitStack() as stack:
            if self.accelerator.mixed_precision == "no" and not shards_parameters(self.accelerator):
                stack.enter_context(folded_loras(self.model, CLIENT))
                if self.args.teacher == "online":
                    stack.enter_context(folded_loras(self.models.adap_fu, CLIENT))
            yield

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask, split = inputs["attention_mask"], self.models.split
        with without_dropout(model):
            teacher = self.teacher(inputs)
        # The KL divergence makes the logits that it needs, where it needs them.
        student, outputs = self.run_student(model, inputs, split.layers_name, split.top_position)
        with self._logits() as logits:
            l2, kl = distances(student, teacher, mask, logits)
        loss = self.mean("alignment_l2", l2, mask, num_items_in_batch)
        if kl is not None:
            loss = loss + self.args.alignment_kl_weight * self.mean("alignment_kl", kl, mask, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _logits(self):
        """The output head, if the KL divergence counts."""
        return self.head.whole() if self.args.alignment_kl_weight > 0 else nullcontext()

    def save_model(self, output_dir=None, _internal_call=False):
        """Write the emulator package."""
        emulator = self.models.adap_emu
        loras = get_lora_state(emulator, CLIENT), get_lora_state(emulator, EMULATOR)
        self.models.package(*loras).save(output_dir or self.args.output_dir, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _, state = load_lora(Path(resume_from_checkpoint) / "emulator_lora")
        set_lora_state(self.model, EMULATOR, state)

    def _load_best_model(self):
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
