"""
What is done here about what libraries do not promise to keep: functions around their private attributes, which
`upstream.py` lists, and what older versions do otherwise.

The code is written for the newest versions. What older ones do otherwise is in `DIFFERENCES`, and made up for by a
function here: nothing else asks for a version.
"""

import copy
import importlib.metadata
import platform
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments


@dataclass(frozen=True)
class Difference:
    """
    What versions of a library before one of them do otherwise.

    Attributes:
        library (`str`): Its name.
        before (`str`): The first version that needs nothing.
        why (`str`): What the ones before it lack.
        link (`str`): The source of that version.
        test (`str`): The test that fails in the ones before it without what is done here.
    """

    library: str
    before: str
    why: str
    link: str
    test: str

    @property
    def applies(self) -> bool:
        """Whether the installed version is one of them."""
        return Version(importlib.metadata.version(self.library)) < Version(self.before)


_GITHUB = "https://github.com/"
FUSED_HEAD = Difference(
    library="trl",
    before="1.15",
    why="`SFTTrainer` computes the same loss in another function, which no one can call without data",
    link=_GITHUB + "huggingface/trl/blob/v1.15.0/trl/trainer/utils.py",
    test="test_local_step",
)
SCALED_LOSS = Difference(
    library="transformers",
    before="5.19",
    why="`Trainer` does not read `loss_is_scaled_for_ga`; TRL sets what it does read only from 1.15 on",
    link=_GITHUB + "huggingface/transformers/blob/v5.19.0/src/transformers/trainer.py",
    test="test_loss_of_a_trainers_own_is_not_divided_again",
)
GROUPED_HEADS = Difference(
    library="torch",
    before="2.12",
    why="attention whose heads share keys and values is not counted, but an error",
    link=_GITHUB + "pytorch/pytorch/blob/v2.12.0/torch/utils/flop_counter.py",
    test="test_attention_with_grouped_heads_is_counted",
)
EXPERTS = Difference(
    library="peft",
    before="0.20",
    why="loads no LoRA of a model whose experts' weights transformers fuses as it reads them",
    link=_GITHUB + "huggingface/peft/blob/v0.20.0/src/peft/utils/transformers_weight_conversion.py",
    test="test_mixtures_of_experts_are_refused_where_peft_cannot_load_them",
)
CPU_CAPABILITIES = Difference(
    library="torch",
    before="2.13",
    why="tells some instructions of the CPU one by one, and only those of x86",
    link=_GITHUB + "pytorch/pytorch/blob/v2.13.0/torch/cpu/__init__.py",
    test="test_instructions_for_bfloat16_are_found",
)
LABELS_ALONE = Difference(
    library="trl",
    before="1.16",
    why="has no `_use_triton` there: no device is an exception to what the loss projects",
    link=_GITHUB + "huggingface/trl/blob/v1.16.0/trl/trainer/utils.py",
    test="test_positions_without_a_label_are_not_scored",
)
DIFFERENCES = (FUSED_HEAD, SCALED_LOSS, GROUPED_HEADS, EXPERTS, CPU_CAPABILITIES, LABELS_ALONE)


# Everything a module keeps of hooks that run with it; hooks for state dicts stay.
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name and ("forward" in name or "backward" in name))


def copy_module(module: nn.Module) -> nn.Module:
    """A new module object around the same parameters, buffers and children, without hooks."""
    new = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(new, name, vars(module)[name].copy())
    new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name in _HOOKS:
        setattr(new, name, OrderedDict())
    # transformers puts hooks on a model that was once asked for hidden states, and this mark; the copy gets its own.
    vars(new).pop("_output_capturing_hooks_installed", None)
    return new


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name, to read and to change: also those that are `None` or stand twice."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether something is to run before or after the module's forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common. Tensors on the meta device have no `data_ptr`."""
    return tensor.untyped_storage()._cdata


def ignore_in_ddp(model: nn.Module, names: Iterable[str]):
    """Let `DistributedDataParallel` neither send nor reduce these parameters and buffers."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


def set_rates(scheduler: LRScheduler, rates: Sequence[float]):
    """Set the learning rates of a scheduler's optimizer, also for those who ask the scheduler."""
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = list(rates)


def loss_is_scaled(trainer: Trainer):
    """Have `Trainer` leave the loss of one with `loss_is_scaled_for_ga` as it is."""
    if SCALED_LOSS.applies:
        trainer.model_accepts_loss_kwargs = False
        trainer.compute_loss_func = "not called, and not None: nothing is divided"


def add_fused_lm_head(model: PreTrainedModel, outputs: tuple[str, ...]):
    """
    Let `model(..., labels=labels, fused_lm_head=True)` run as [`~trl.SFTTrainer`] has it, and return `log_probs` of shape
    `(batch_size, sequence_length - 1)`.
    """
    if not FUSED_HEAD.applies:
        from trl.trainer.utils import add_fused_lm_head

        return add_fused_lm_head(model, outputs=outputs)

    def log_probs(hidden, weight, bias, labels):
        logits = nn.functional.linear(hidden.float(), weight.float(), bias if bias is None else bias.float())
        return -cross_entropy(logits, labels, reduction="none")

    def forward(*args, labels, fused_lm_head, **kwargs):
        hidden = model.base_model(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
        head, shape = model.get_output_embeddings(), hidden.shape[:2]
        chunks = zip(hidden.flatten(0, 1).split(256), labels[:, 1:].flatten().split(256), strict=True)
        found = [
            checkpoint(log_probs, h, head.weight, head.bias, y, use_reentrant=False, preserve_rng_state=False)
            for h, y in chunks
        ]
        return SimpleNamespace(log_probs=torch.cat(found).view(shape))

    model.forward = forward


@contextmanager
def labels_alone():
    """
    Have the loss of [`~trl.SFTTrainer`] project positions with a label alone onto the vocabulary on a CPU and on MPS too:
    of a prompt with a short completion they are few, and the vocabulary is a large part of a small model's work.
    """
    if LABELS_ALONE.applies:
        yield
        return
    from trl.trainer import utils

    has_triton = utils._use_triton
    utils._use_triton = lambda device: device.type in ("cpu", "mps") or has_triton(device)
    try:
        yield
    finally:
        utils._use_triton = has_triton


def worker_settings(args: TrainingArguments) -> dict[str, Any]:
    """What a `DataLoader` is to be told of its workers, as far as this version has settings for it."""
    names = ("num_workers", "prefetch_factor", "multiprocessing_context", "in_order")
    return {name: getattr(args, f"dataloader_{name}") for name in names if hasattr(args, f"dataloader_{name}")}


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16, as far as torch can tell."""
    if CPU_CAPABILITIES.applies:
        if platform.machine() not in ("x86_64", "AMD64"):
            return True
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def loads_loras(model: PreTrainedModel) -> bool:
    """Whether PEFT can load a LoRA of this model, of whatever layers."""
    if not EXPERTS.applies:
        return True
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping, get_model_conversion_mapping

    try:
        build_peft_weight_mapping(get_model_conversion_mapping(model), "default")
    except TypeError:  # of a constructor of transformers, which has no such argument any more
        return False
    return True


def attention_flops() -> dict[Callable, Callable]:
    """What torch's `FlopCounterMode` is to be told of attention, as `custom_mapping`."""
    if not GROUPED_HEADS.applies:
        return {}

    def forward(query, key, value, *args, **kwargs):
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (size + value[3])

    def backward(gradient, query, key, value, *args, **kwargs):
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (3 * size + 2 * value[3])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention: forward,
        aten._scaled_dot_product_flash_attention_backward: backward,
    }
