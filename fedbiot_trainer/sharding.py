"""What changes when a run has several processes, or parameters are sharded over them (DeepSpeed ZeRO-3)."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments


def is_main_process() -> bool:
    """Whether this process is the one that writes files. True where there is only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 has taken the parameter over."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter that may be sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[torch.Tensor], write: bool = False) -> Iterator[None]:
    """
    Have the whole values of `parameters` in the block. All processes must enter it.

    Args:
        parameters (iterable of `torch.Tensor`): Sharded or not.
        write (`bool`, *optional*, defaults to `False`): Whether the block changes them (in all processes alike).
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a model that may be sharded, whole on the CPU of the main process and empty on the others."""
    if not any(map(is_sharded, model.parameters())):
        return model.state_dict()
    persistent = model.state_dict().keys()
    state = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            if is_main_process():
                state[name] = parameter.detach().to("cpu", copy=True)
    return state


@contextmanager
def runnable(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let a model that no training has wrapped do forward passes in the block, sharded if the run shards parameters."""
    if not shards_parameters(accelerator):
        yield
        return
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            name: value
            for name, value in config["zero_optimization"].items()
            if value != "auto" and name not in ("offload_optimizer",)
        },
    }
    engine = deepspeed.initialize(model=model, config=config)[0]
    try:
        yield
    finally:
        engine.optimizer.destroy()
        engine.destroy()
        take_off_hooks(engine)


def take_off_hooks(engine: nn.Module):
    """Take off the hooks that a DeepSpeed engine leaves on its model, and with which the model would keep it alive."""
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()


def free_engine(accelerator: Accelerator):
    """End a training: free what it prepared, so that the model can be used again without it."""
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    accelerator.free_memory()
    if wrapped is not None:
        take_off_hooks(wrapped.engine)


def shards_parameters(accelerator: Accelerator) -> bool:
    """Whether the run is under ZeRO-3."""
    return (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )


class DeepSpeedSettings:
    """
    The DeepSpeed configuration as the user gave it. Transformers fills its `"auto"` values for one trainer; here
    several trainers with other batch sizes use it in turn.

    Args:
        config (`dict`): The configuration.

    Raises:
        ValueError: If it brings an optimizer or a scheduler.
    """

    BATCHES = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")

    def __init__(self, config: dict):
        for section in ("optimizer", "scheduler"):
            if section in config:
                raise ValueError(
                    f"The DeepSpeed configuration has a `{section}` section, but the two LoRAs have optimizers and "
                    "schedules of their own. Leave it out, and set `learning_rate`, `alignment_learning_rate` and "
                    "their schedules."
                )
        self.config = copy.deepcopy(config) | dict.fromkeys(self.BATCHES, "auto")

    def apply(self, accelerator: Accelerator, args: TrainingArguments):
        """Make them the settings of the trainer with `args`, which is next."""
        from transformers.integrations.deepspeed import propagate_args_to_deepspeed

        plugin = accelerator.state.deepspeed_plugin
        plugin.hf_ds_config.config = copy.deepcopy(self.config)
        propagate_args_to_deepspeed(accelerator, args)


def deal(batches: Sequence[list], accelerator: Accelerator) -> Iterator[tuple[list, bool]]:
    """
    Deal batches out to the processes, the same number to each, so that they can run a sharded model together.

    Yields:
        `tuple[list, bool]`: A batch and whether it counts: where they run out, the last is repeated for nothing.
    """
    for i in range(0, len(batches), accelerator.num_processes):
        mine = i + accelerator.process_index
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)
