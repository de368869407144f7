"""The teacher of the alignment: the full model, run for every batch, or once for all public text."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from tqdm.auto import tqdm

from ..config.settings import AlignmentSettings
from ..shared.losses import hidden_state_loss, masked_kl
from ..shared.processes import is_zero3, runnable
from ..shared.step_sampler import StepSampler
from .capture import Captured, causal_lm, run_adapter_layers, run_full_model
from .hidden_states import GB, HiddenStateStore, fill_store, model_digest, store_folder, texts_digest
from .split_model import SplitModel


PLACE = "fedbiot_place"  # column of the public text: its place in the store
STATES = "teacher_states"  # entry of a batch: the stored hidden states

Collator = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
OnProgress = Callable[[int, int], None]


class Teacher(Protocol):
    """What the alignment trainer asks for the targets of a batch."""

    def prepare(self, num_steps: int, on_progress: OnProgress | None = None):
        """Get ready for the first `num_steps` alignment steps of the run."""

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch, with what the teacher keeps of its texts."""

    def __call__(self, inputs: dict[str, torch.Tensor]) -> Captured:
        """The teacher's hidden states for a batch."""


def distances(
    student: Captured, teacher: Captured, mask: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    How far a student is from its teacher: the two terms of the alignment loss, summed over the tokens of `mask`.

    Args:
        student, teacher ([`Captured`]): Hidden states, `(batch_size, sequence_length, hidden_size)`.
        mask (`torch.Tensor`): `(batch_size, sequence_length)`, non-zero where a token is not padding.
        logits (callable, *optional*): The output head. `None` leaves the KL divergence out.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: Hidden-state distance and KL divergence, float32 scalars.
    """
    l2 = hidden_state_loss(student.entering, teacher.entering, mask)
    return l2, None if logits is None else masked_kl(student.last, teacher.last, mask, logits)


class OnlineTeacher:
    """
    The full model, run in every alignment step.

    Args:
        models ([`SplitModel`]): The full model, with the client LoRA as it is at each step.
        accelerator (`Accelerator`): Tells the precision.
        collate (callable): Makes padded batches of tokenized texts.

    Raises:
        ValueError: If the run's processes shard the full model so that it cannot be run then.
    """

    def __init__(self, models: SplitModel, accelerator: Accelerator, collate: Collator):
        if is_zero3(accelerator):
            raise ValueError(
                "`teacher` is 'online', but under DeepSpeed ZeRO-3 the shards of the full model cannot be gathered while "
                "the emulator trains. Use `teacher='cached'` or, with adapter layers at the bottom, DDP or ZeRO-2."
            )
        self.models, self.accelerator, self.collate = models, accelerator, collate

    def prepare(self, num_steps: int, on_progress: OnProgress | None = None):
        """Nothing: it computes when it is asked."""

    def __call__(self, inputs: dict[str, torch.Tensor]) -> Captured:
        with self.accelerator.autocast():
            return run_full_model(self.models, {name: inputs[name] for name in ("input_ids", "attention_mask")})


class CachedTeacher:
    """
    What enters the full model's adapter layers, computed once for all public text and kept on disk for later runs; the
    adapter layers alone, with the client LoRA as it is, make the rest of it at each step.

    It holds because nothing that training changes is below the adapter layers.

    Args:
        models ([`SplitModel`]): The models.
        settings ([`AlignmentSettings`]): Where the store is, how large it may be, and in what batches it is filled.
        accelerator (`Accelerator`): Tells processes, device and precision.
        collate (callable): Makes padded batches of tokenized texts.
        texts ([`~datasets.Dataset`]): The tokenized public text.
        steps (callable): The batches of all processes in a range of alignment steps.
        num_steps (`int`): Alignment steps of the whole run.
        show_bar (`bool`, *optional*, defaults to `True`): Whether there is a progress bar where nobody else shows it.

    Attributes:
        dataset ([`~datasets.Dataset`]): The text to train on: `texts`, each with its place in the store.
        store ([`HiddenStateStore`], *optional*): The store, once it is filled.

    Raises:
        ValueError: If the store would be larger than `teacher_cache_max_gb`.
    """

    def __init__(
        self,
        models: SplitModel,
        settings: AlignmentSettings,
        accelerator: Accelerator,
        collate: Collator,
        texts: Dataset,
        steps: Callable[[int, int], StepSampler],
        num_steps: int,
        show_bar: bool = True,
    ):
        self.models, self.settings, self.accelerator = models, settings, accelerator
        self._pad, self._steps, self._shows_bar = collate, steps, show_bar
        self.store: HiddenStateStore | None = None
        self._dtype = models.adap_emu.get_input_embeddings().weight.dtype
        self._hidden_size = causal_lm(models.adap_emu).config.get_text_config().hidden_size
        carried = models.wiring.carried if models.wiring is not None else []
        self._width = self._hidden_size + sum(width for _, width in carried)
        # A run that does not see every text needs only the beginning of the store.
        needed = steps(0, num_steps).rows()
        whole = len(needed) == len(texts)
        order = range(len(texts)) if whole else list(dict.fromkeys([*needed, *range(len(texts))]))
        self._texts = texts.select(order)
        self._lengths = [len(ids) for ids in self._texts["input_ids"]]
        self._places = dict(zip(order, range(len(texts)), strict=True))
        self.dataset = texts.add_column(PLACE, [self._places[row] for row in range(len(texts))])
        self._check_size(len(needed))

    def _check_size(self, num_needed: int):
        num_bytes = HiddenStateStore(None, self._lengths, self._width, self._dtype).num_bytes(num_needed)
        if num_bytes > self.settings.teacher_cache_max_gb * GB:
            raise ValueError(
                f"`teacher_cache_max_gb` is {self.settings.teacher_cache_max_gb}, but the hidden states of {num_needed} "
                f"public texts ({num_bytes // (self._width * self._dtype.itemsize)} tokens x {self._width} x "
                f"{self._dtype}, in whole files) take {num_bytes / GB:.2g} GB. Raise it, pass less public text, "
                "or set `teacher='online'`."
            )

    def prepare(self, num_steps: int, on_progress: OnProgress | None = None):
        """
        Open the store and compute what it lacks for the first `num_steps` alignment steps.

        Args:
            num_steps (`int`): Steps of the run, from its start.
            on_progress (callable, *optional*): Called with the numbers of texts done and to do. Defaults to a bar.

        Raises:
            OSError: If the disk is too full.
        """
        num_texts = 1 + max(self._places[row] for row in self._steps(0, num_steps).rows())
        if self.store is not None and self.store.has(num_texts):
            return
        store = HiddenStateStore(self._folder(), self._lengths, self._width, self._dtype)
        bar = tqdm(desc="Hidden states of the public text", disable=on_progress is not None or not self._shows_bar)

        def show(done, total):
            bar.total = total
            bar.update(done - bar.n)

        with store.in_use():
            if self.accelerator.is_local_main_process:
                store.make_room(num_texts, self.settings.teacher_cache_max_gb * GB)
            with bar, self.models.whole_on(self.accelerator.device), runnable(self.models.adap_fu, self.accelerator):
                batch_size = self.settings.alignment_batch_size
                fill_store(store, num_texts, self._compute, batch_size, self.accelerator, on_progress or show)
        self.store = store

    def _folder(self):
        """Named by all that enters the computation."""
        full = causal_lm(self.models.adap_fu)
        return store_folder(
            self.settings.teacher_cache_dir,
            model=model_digest(full),
            architecture=f"{type(full).__module__}.{type(full).__qualname__}",
            attention=full.config._attn_implementation,
            transformers=transformers.__version__,
            config={**full.config.to_diff_dict(), "_name_or_path": None},
            layer=self.models.split.top_index,
            texts=texts_digest(self._texts),
            dtype=str(self._dtype),
            mixed_precision=self.accelerator.mixed_precision,
        )

    def _compute(self, rows: list[int]) -> torch.Tensor:
        """What enters the full model's adapter layers for texts of the store, one after the other."""
        batch = self._pad([self._texts[row] for row in rows])
        text = {name: batch[name].to(self.accelerator.device) for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            return run_full_model(self.models, text).states[text["attention_mask"].bool()]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch, with the stored hidden states where it is not padding."""
        places = [example.pop(PLACE, None) for example in examples]
        batch = self._pad(examples)
        if self.store is not None and None not in places:  # other text than the public one has no place
            mask = batch["attention_mask"].bool()
            batch[STATES] = torch.zeros(*mask.shape, self._width, dtype=self.store.dtype)
            batch[STATES][mask] = torch.cat([self.store[place] for place in places])
        return batch

    def __call__(self, inputs: dict[str, torch.Tensor]) -> Captured:
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            if STATES not in inputs:
                return run_full_model(self.models, text)
            if self.settings.alignment_kl_weight == 0:
                seen = Captured()
                seen.entering = inputs[STATES][..., : self._hidden_size]
                return seen
            return run_adapter_layers(self.models, text, inputs[STATES])
