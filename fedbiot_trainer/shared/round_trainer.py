"""What the client's trainer and the alignment trainer have in common: many short trainings of one LoRA."""

import copy
import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, SchedulerType, get_scheduler, set_seed
from transformers.utils import is_liger_kernel_available, logging
from trl import SFTTrainer

from ..config import FedBiOTConfig
from .arguments import check_callbacks, prepare_for_best_model
from .compat import ignore_in_ddp, set_rates, worker_settings
from .lora_state import CLIENT, set_trainable_lora
from .processes import DeepSpeedSettings, free_engine, local_part, prepare_fsdp, renew_trainable, whole_shape
from .quantized import check_gradient
from .step_sampler import StepSampler
from .texts import (
    blank_rows,
    check_texts,
    subject,
    text_columns,
    token_bounds,
    token_lengths,
    trained_tokens,
    without_other_forms,
)
from .tokenizers import align_model, prepare_tokenizer


logger = logging.get_logger(__name__)


class DivergenceError(RuntimeError):
    """A training whose loss or LoRA is not finite any more. Nothing of it is to be used."""


class RoundTrainer(SFTTrainer):
    """
    An [`~trl.SFTTrainer`] of one of the two LoRAs, whose every `train()` call takes the next `args.max_steps` steps of
    an endless pass over its data, with a fresh optimizer.

    Attributes:
        lora_name (`str`): The LoRA that it trains.
        steps_done (`int`): Optimizer steps taken in earlier calls; set it to continue somewhere else.
        total_steps (`int`): Steps over which the learning-rate schedule runs.
        schedule_start (`int`, *optional*): Where in it the next call starts. `None`: at `steps_done`.
    """

    lora_name: str
    train_dataset: Dataset
    data_collator: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]
    text_name = "`train_dataset`"
    learning_rate_name = "learning_rate"

    def __init__(
        self,
        model,
        args: FedBiOTConfig,
        total_steps: int,
        train_dataset: Dataset,
        share_accelerator: "RoundTrainer | None" = None,
        **kwargs,
    ):
        if kwargs.get("formatting_func") is None:
            check_texts(train_dataset, self.text_name, args.dataset_text_field)
        if kwargs.get("optimizers", (None, None)) != (None, None):
            raise ValueError("`optimizers` cannot be passed: every round starts with a fresh optimizer.")
        check_callbacks(kwargs.get("callbacks") or [])
        self._accelerator_from = share_accelerator
        self._deepspeed: DeepSpeedSettings | None = None
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        if args.use_liger_kernel and not is_liger_kernel_available():
            raise ImportError(
                "`use_liger_kernel` is True, but the library is not installed: `pip install liger-kernel`, or leave it out."
            )
        tokenizer = kwargs.pop("processing_class", None)
        if tokenizer is None:
            name = model.config.name_or_path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        tokenizer = prepare_tokenizer(tokenizer, args)
        align_model(model, tokenizer, args)
        # That is done: TRL would resize the embedding for a chat template of other tokenizers.
        args = copy.copy(args)
        args.eos_token = args.chat_template_path = None
        prepare_for_best_model(args)
        # TRL would cast a LoRA that is trainable by now to bfloat16, if the model is quantized.
        model.requires_grad_(False)
        super().__init__(model=model, args=args, train_dataset=train_dataset, processing_class=tokenizer, **kwargs)
        # Raises ImportError now, not in the first round, if the optimizer's library is not installed.
        self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.steps_done = 0
        self.total_steps = total_steps
        self.schedule_start: int | None = None
        self.step_metrics: dict[str, list[float]] = defaultdict(list)
        scaler = self.accelerator.scaler
        self._first_scale = None if scaler is None else scaler.state_dict()
        self._check_vocabulary()
        self._check_tokens(self.train_dataset, self.text_name)
        check_gradient(self.model)

    def create_accelerator_and_postprocess(self):
        other = self._accelerator_from
        if other is None:
            if self.args.deepspeed_plugin is not None:
                self._deepspeed = DeepSpeedSettings(self.args.deepspeed_plugin.hf_ds_config.config)
            super().create_accelerator_and_postprocess()
            prepare_fsdp(self.accelerator)
        else:
            # DeepSpeed allows one accelerator in a process.
            self._deepspeed = other._deepspeed
            for name in ("accelerator", "gather_function", "is_deepspeed_enabled", "is_fsdp_enabled"):
                setattr(self, name, getattr(other, name))

    def _check_vocabulary(self):
        size, rows = len(self._tokenizer), whole_shape(self.model.get_input_embeddings().weight)[0]
        if size > rows:
            raise ValueError(
                f"`processing_class` has a vocabulary of {size} tokens, but the model's embedding has {rows} rows. Use "
                "the model's own tokenizer, or resize the full model's embedding before you split it."
            )

    def prepare(self, dataset: Dataset, name: str, packing: bool | None = None) -> tuple[Dataset, int]:
        """
        Tokenize a dataset as the trainer's own is, without the rows that have no token to train on.

        Args:
            dataset ([`~datasets.Dataset`]): Text, in any form that [`~trl.SFTTrainer`] takes.
            name (`str`): What errors call it.
            packing (`bool`, *optional*): Defaults to `args.packing`.

        Returns:
            `tuple[Dataset, int]`: The tokenized text, and of how many rows of `dataset` it is.

        Raises:
            TypeError, ValueError: If it is no text, nothing of it can be trained on, or a text is longer than the model's
                positions.
        """
        packing = self.args.packing if packing is None else packing
        blank = set()
        if self._formatting_func is None:
            check_texts(dataset, name, self.args.dataset_text_field)
            blank = blank_rows(dataset, self._trained_columns(dataset, name))
        texts = dataset.select([row for row in range(len(dataset)) if row not in blank]) if blank else dataset
        whole = copy.copy(self.args)
        if packing:  # which cuts texts itself
            whole.max_length, whole.shuffle_dataset = None, False
        prepared = self._prepare(texts, whole, False, name) if len(texts) else texts
        bound = self.args.max_length if packing and self.args.packing_strategy == "bfd" else None
        tokens = trained_tokens(prepared, bound) if len(prepared) else np.zeros(0)
        num_examples = int((tokens > 0).sum())
        if num_examples == 0:
            raise ValueError(
                f"{subject(name)} has no token to train on: each of its {len(dataset)} examples is empty, or "
                f"everything within `max_length` ({self.args.max_length}) is masked. Raise `max_length`, or check the "
                "completions."
            )
        if num_examples < len(dataset):
            logger.warning(
                f"{len(dataset) - num_examples} of the {len(dataset)} examples of {name} are left out and do not count: "
                f"they are empty, or everything within `max_length` ({self.args.max_length}) is masked."
            )
        if num_examples < len(prepared):
            prepared = prepared.select(np.flatnonzero(tokens))
        if packing:
            prepared = self._prepare(prepared, self.args, True, name)
            prepared = prepared.select(np.flatnonzero(trained_tokens(prepared)))  # some are a long prompt's middle
        self._check_tokens(prepared, name)
        return prepared, num_examples

    def with_labels(self, dataset: Dataset, name: str) -> Dataset:
        """The rows of a dataset that have a token to train on, tokenized and not packed; there may be none."""
        tokens = self._prepare(dataset, self.args, False, name)
        return tokens.select(np.flatnonzero(trained_tokens(tokens))) if len(tokens) else tokens

    def _prepare(self, dataset, args, packing, name):
        return self._prepare_dataset(
            dataset=dataset,
            processing_class=self.processing_class,
            args=args,
            packing=packing,
            formatting_func=self._formatting_func,
            dataset_name=name,
        )

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if isinstance(dataset, Dataset) and formatting_func is None:
            dataset = without_other_forms(dataset, dataset_name, args.dataset_text_field)
        return super()._prepare_dataset(
            dataset=dataset,
            processing_class=processing_class,
            args=args,
            packing=packing,
            formatting_func=formatting_func,
            dataset_name=dataset_name,
        )

    def _trained_columns(self, dataset, name) -> tuple[str, ...]:
        columns = text_columns(dataset, name, self.args.dataset_text_field)
        return columns[-1:] if self.completion_only_loss else columns

    def _check_tokens(self, tokens: Dataset, name: str):
        (least, most), rows = token_bounds(tokens), whole_shape(self.model.get_input_embeddings().weight)[0]
        if least < 0 or most >= rows:
            raise ValueError(
                f"{subject(name)} has the token {least if least < 0 else most}, but the model's embedding has {rows} rows. Tokenize "
                "it with the model's own tokenizer."
            )
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(token_lengths(tokens).max(initial=0))
        if positions is not None and longest > positions:
            raise ValueError(
                f"`max_length` is {self.args.max_length}, and the longest text of {name} has {longest} tokens, but the "
                f"model has {positions} positions (`config.max_position_embeddings`). Set `max_length` to {positions} at "
                "most."
            )

    def record(self, name: str, value: torch.Tensor):
        """Keep a scalar of this step, for the logs and for `step_metrics`."""
        self._metrics["train" if self.model.training else "eval"][name].append(value.item())
        if self.model.training:
            self.step_metrics[name].append(self._metrics["train"][name][-1])

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the optimizer is next
            recorded = (values[-1] for values in self.step_metrics.values() if values)
            self._check_finite("loss", all(map(math.isfinite, recorded)))
        return loss

    def _check_finite(self, what: str, finite: bool):
        """
        Raise [`DivergenceError`] if something is not finite in any process. All must ask: they stop together, before one
        waits in vain for another's gradients.
        """
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(not finite), device=self.accelerator.device)
            finite = self.accelerator.reduce(flag).item() == 0
        if finite:
            return
        rate, name = self._get_learning_rate(), self.learning_rate_name
        step = self.steps_done + self.state.global_step + (what == "loss")
        advice = f"Lower `{name}` (to {rate / 10:.1g}, for example), or let it rise over the first steps"
        if step == 1:
            advice = (
                "Nothing was trained yet, so look at the model and its precision first (`fp16` overflows: use `bf16`)"
            )
        raise DivergenceError(
            f"The {what} of the {self.lora_name} LoRA is not finite in step {step} of {self.total_steps}, at `{name}` "
            f"{rate:.3g}. {advice}."
        )

    def step_sampler(self, start: int, stop: int, process_index: int | None = None) -> StepSampler:
        """The batches of one process, or of all, in the steps `start`, ..., `stop - 1`."""
        num_processes = self.accelerator.num_processes
        micro_batches = self.args.gradient_accumulation_steps * num_processes
        return StepSampler(
            len(self.train_dataset),
            self.args.per_device_train_batch_size,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            start * micro_batches + (process_index or 0),
            stop * micro_batches,
            self.args.dataloader_drop_last,
            step=1 if process_index is None else num_processes,
        )

    def get_train_dataloader(self) -> DataLoader:
        device, stop = self.accelerator.device, self.steps_done + self.args.max_steps
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self.step_sampler(self.steps_done, stop, self.accelerator.process_index),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and torch.accelerator.is_available(),
            **worker_settings(self.args),
        )
        # The sampler gives each process its own batches; there is nothing left to distribute.
        return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            kind, warmup_steps = self.args.lr_scheduler_type, self.args.get_warmup_steps(self.total_steps)
            if kind == SchedulerType.CONSTANT and warmup_steps > 0:  # Transformers would leave the warmup out
                kind = SchedulerType.CONSTANT_WITH_WARMUP
            scheduler = get_scheduler(
                kind,
                optimizer=optimizer or self.optimizer,
                num_warmup_steps=warmup_steps,
                num_training_steps=self.total_steps,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )
            # The optimizer is new in every round, the schedule goes on.
            start = self.steps_done if self.schedule_start is None else self.schedule_start
            scheduler.lr_lambdas = [
                lambda step, schedule=schedule, offset=start: schedule(step + offset)
                for schedule in scheduler.lr_lambdas
            ]
            rates = [
                rate * schedule(0) for rate, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            set_rates(scheduler, rates)
            self.lr_scheduler = scheduler
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def train(self, *args, seed: int | None = None, **kwargs):
        """
        Take the next `args.max_steps` steps.

        Args:
            seed (`int`, *optional*): Seed of dropout in these steps. `None` takes `args.seed`.

        Raises:
            DivergenceError: If a loss or, after the last step, the LoRA is not finite.
        """
        set_seed(self.args.seed if seed is None else seed)
        set_trainable_lora(self.model, self.lora_name, self.args.freeze_a and self.lora_name == CLIENT)
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.step_metrics.clear()
        if self._first_scale is not None:  # fp16's loss scale is of the last training, maybe another trainer's
            self.accelerator.scaler.load_state_dict(self._first_scale)
        renew_trainable(self.model)
        self._prepare_processes()
        # Accelerate wraps `forward` for mixed precision, and Transformers wraps `generate` for FSDP2. Both go with the
        # training that wanted them, and so does Accelerate's mark, with which it would not wrap `forward` again.
        forward, generate = (vars(self.model).get(name) for name in ("forward", "generate"))
        try:
            output = super().train(*args, **kwargs)
        finally:
            for name in ("forward", "_is_accelerate_prepared"):
                self.model.__dict__.pop(name, None)
            if forward is not None:
                self.model.forward = forward
            if generate is not None:
                self.model.generate = generate
            self.deepspeed = None
            self.model_wrapped = self.model
            free_engine(self.accelerator)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._check_finite("value", all(bool(torch.isfinite(local_part(p)).all()) for p in trained))
        self._average_step_metrics()
        self.steps_done += self.args.max_steps
        return output

    def _prepare_processes(self):
        if self.accelerator.num_processes > 1 and self._deepspeed is None:
            # Frozen tensors are equal in all processes. Without this, DDP would send all of them in every `train()`.
            frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
            frozen += [name for name, _ in self.model.named_buffers()]
            ignore_in_ddp(self.model, frozen)
        if self._deepspeed is not None:
            self._deepspeed.apply(self.accelerator, self.args)

    def _average_step_metrics(self):
        """Metrics of a step are its process's own until here."""
        if self.accelerator.num_processes > 1:
            for name in sorted(self.step_metrics):
                values = torch.tensor(self.step_metrics[name], dtype=torch.float64, device=self.accelerator.device)
                self.step_metrics[name] = self.accelerator.reduce(values, "mean").tolist()

    def take_steps(self, num_steps: int, seed: int | None = None):
        """[`train`] for `num_steps` steps."""
        self.args.max_steps = num_steps
        return self.train(seed=seed)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """Nothing: the card of a federated run describes the whole run and is written by [`FederatedRunner`]."""


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """
    Keep what exists now out of garbage collection. Accelerate collects at the start of every `train()`, and going
    through all modules of the libraries and the models each time takes longer than a small client's local steps.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
