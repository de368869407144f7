"""The server's step: train the emulator LoRA on public text until the emulator behaves like the full model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import FedBiOTConfig
from ..shared.lora_layers import folded_loras
from ..shared.lora_state import CLIENT, EMULATOR, get_lora_state, load_lora, set_lora_state
from ..shared.losses import hidden_state_loss, masked_kl
from ..shared.processes import is_zero3, runnable, shards_parameters
from ..shared.round_trainer import RoundTrainer
from ..wire.package import load_model
from .capture import Captured, OutputHead, capture, causal_lm, run_adapter_layers, run_full_model
from .hidden_states import GB, HiddenStateStore, fill_store, model_digest, store_folder, texts_digest
from .split_check import check_split
from .split_model import SplitModel


PLACE = "fedbiot_place"  # column of the public text: its place in the store
STATES = "teacher_states"  # entry of a batch: the stored hidden states


class EmulatorAlignmentTrainer(RoundTrainer):
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
            The emulator LoRA. Defaults to `peft_config`, with rank `args.emulator_lora_r` if that is set.
        total_steps (`int`, *optional*):
            Steps over which the learning-rate schedule runs, if there will be more of them than `train()` takes.
        **kwargs:
            As for [`~trl.SFTTrainer`], `optimizers` excepted.
    """

    lora_name = EMULATOR
    learning_rate_name = "alignment_learning_rate"
    text_name = "`public_dataset`"
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "fedbiot"]

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
        if isinstance(model, str):
            model = load_model(model, **args.init_kwargs())
        if isinstance(model, SplitModel):
            if peft_config is not None or emulator_peft_config is not None:
                given = "peft_config" if peft_config is not None else "emulator_peft_config"
                raise ValueError(f"`{given}` was passed with a `SplitModel`, which has its LoRAs. Leave it out.")
        else:
            model = SplitModel.from_config(model, args, peft_config, emulator_peft_config)
        if not model.split.kept:
            raise ValueError(
                f"`num_adapter_layers` is {args.num_adapter_layers}, which takes all layers, so there is no emulator to "
                "align. Leave some layers to it."
            )
        self.models, given = model, args
        model.move(args.device, args.offload_full_model)
        args = args.alignment_arguments()
        args.model_init_kwargs = None
        super().__init__(model.adap_emu, args, total_steps or args.max_steps, train_dataset, **kwargs)
        model.align_tokens(self.processing_class, given)
        self.head = OutputHead(causal_lm(model.adap_fu))  # FSDP2 shards the emulator's
        with runnable(model.adap_emu, self.accelerator):
            check_split(model, args.device, not is_zero3(self.accelerator), args.teacher == "cached")
            if args.alignment_kl_weight > 0:
                self.head.check(model, args.device)
        self.store: HiddenStateStore | None = None
        if args.teacher == "cached":
            self._plan_store()
        elif is_zero3(self.accelerator):
            raise ValueError(
                "`teacher` is 'online', but under DeepSpeed ZeRO-3 the shards of the full model cannot be gathered while "
                "the emulator trains. Use `teacher='cached'` or, with adapter layers at the bottom, DDP or ZeRO-2."
            )

    def _plan_store(self):
        """Give each public text a place in the store, and check that what the run needs of it is not too large."""
        num_texts = len(self.train_dataset)
        order = self.step_sampler(0, self.total_steps).rows()
        num_needed = len(order)
        # A run that does not see every text needs only the beginning of the store.
        order = range(num_texts) if num_needed == num_texts else list(dict.fromkeys([*order, *range(num_texts)]))
        self._texts = self.train_dataset.select(order)
        self._lengths = [len(ids) for ids in self._texts["input_ids"]]
        self._places = dict(zip(order, range(num_texts), strict=True))
        places = [self._places[row] for row in range(num_texts)]
        self.train_dataset = self.train_dataset.add_column(PLACE, places)
        self._inner_collator, self.data_collator = self.data_collator, self._collate
        self._hidden_size = causal_lm(self.model).config.get_text_config().hidden_size
        self._width = self._hidden_size + sum(width for _, width in self.models.wiring.carried)
        store = HiddenStateStore(None, self._lengths, self._width, self._states_dtype)
        num_bytes = store.num_bytes(num_needed)
        if num_bytes > self.args.teacher_cache_max_gb * GB:
            raise ValueError(
                f"`teacher_cache_max_gb` is {self.args.teacher_cache_max_gb}, but the hidden states of {num_needed} "
                f"public texts ({num_bytes // (self._width * self._states_dtype.itemsize)} tokens x {self._width} x "
                f"{self._states_dtype}, in whole files) take {num_bytes / GB:.2g} GB. Raise it, pass less public text, "
                "or set `teacher='online'`."
            )

    @property
    def _states_dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    def prepare_teacher(self, on_progress: Callable[[int, int], None] | None = None):
        """
        Open the store of hidden states and compute what it lacks. [`train`] does it too. An online teacher has none.

        Args:
            on_progress (callable, *optional*): Called with the numbers of texts done and to do. Defaults to a bar.

        Raises:
            OSError: If the disk is too full.
        """
        if self.args.teacher == "online":
            return
        sampler = self.step_sampler(0, max(self.total_steps, self.steps_done + self.args.max_steps))
        num_texts = 1 + max(self._places[row] for row in sampler.rows())
        if self.store is not None and self.store.has(num_texts):
            return
        full = causal_lm(self.models.adap_fu)
        folder = store_folder(
            self.args.teacher_cache_dir,
            model=model_digest(full),
            architecture=f"{type(full).__module__}.{type(full).__qualname__}",
            attention=full.config._attn_implementation,
            transformers=transformers.__version__,
            config={**full.config.to_diff_dict(), "_name_or_path": None},
            layer=self.models.split.top_index,
            texts=texts_digest(self._texts),
            dtype=str(self._states_dtype),
            mixed_precision=self.accelerator.mixed_precision,
        )
        store = HiddenStateStore(folder, self._lengths, self._width, self._states_dtype)
        if self.accelerator.is_local_main_process:
            store.make_room(num_texts, self.args.teacher_cache_max_gb * GB)
        bar = tqdm(desc="Hidden states of the public text", disable=self.args.disable_tqdm or on_progress is not None)

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        with (
            bar,
            self.models.whole_on(self.args.device),
            runnable(self.models.adap_fu, self.accelerator),
        ):
            batch_size = self.args.alignment_batch_size
            fill_store(store, num_texts, self._entering_states, batch_size, self.accelerator, on_progress or show)
        self.store = store

    def _entering_states(self, rows: list[int]) -> torch.Tensor:
        """What enters the full model's adapter layers for texts of the store, one after the other."""
        inputs = self._prepare_inputs(self._inner_collator([self._texts[row] for row in rows]))
        mask = inputs["attention_mask"]
        with self.accelerator.autocast():
            states = run_full_model(self.models, {"input_ids": inputs["input_ids"], "attention_mask": mask})
        return states.states[mask.bool()]

    def _collate(self, examples):
        """A padded batch, with the stored hidden states where it is not padding."""
        places = [example.pop(PLACE, None) for example in examples]
        batch = self._inner_collator(examples)
        if self.store is not None and None not in places:  # other text than the public one has no place
            mask = batch["attention_mask"].bool()
            batch[STATES] = torch.zeros(*mask.shape, self._width, dtype=self.store.dtype)
            batch[STATES][mask] = torch.cat([self.store[place] for place in places])
        return batch

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if PLACE not in self._signature_columns:
            self._signature_columns.append(PLACE)

    def train(self, *args, **kwargs):
        self.prepare_teacher()
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

    def _teach(self, inputs: dict[str, torch.Tensor]):
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            if STATES not in inputs:
                return run_full_model(self.models, text)
            if self.args.alignment_kl_weight == 0:
                seen = Captured()
                seen.entering = inputs[STATES][..., : self._hidden_size]
                return seen
            return run_adapter_layers(self.models, text, inputs[STATES])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask = inputs["attention_mask"]
        text = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        split = self.models.split
        with _no_dropout(model):
            teacher = self._teach(inputs)
            with capture(self.model, split.layers_name, split.top_position) as student:
                # The KL divergence makes the logits that it needs, where it needs them.
                no_logits = torch.empty(0, dtype=torch.long, device=mask.device)
                outputs = model(**text, use_cache=False, logits_to_keep=no_logits)

        num_tokens = mask.sum() if num_items_in_batch is None else num_items_in_batch
        l2 = hidden_state_loss(student.entering, teacher.entering, mask) / num_tokens
        self.record("alignment_l2", l2.detach() * self.accelerator.num_processes)
        loss = l2
        if self.args.alignment_kl_weight > 0:
            with self.head.whole() as logits:
                kl = masked_kl(student.last, teacher.last, mask, logits) / num_tokens
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
        emulator = self.models.adap_emu
        loras = get_lora_state(emulator, CLIENT), get_lora_state(emulator, EMULATOR)
        self.models.package(*loras).save(output_dir or self.args.output_dir, self.processing_class)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        _, state = load_lora(Path(resume_from_checkpoint) / "emulator_lora")
        set_lora_state(self.model, EMULATOR, state)


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
