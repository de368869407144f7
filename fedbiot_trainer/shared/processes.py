"""What changes when a run has several processes, or parameters are sharded over them (DeepSpeed ZeRO-3, FSDP2)."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments


def is_main_process() -> bool:
    """Whether this process is the one that writes files. True where there is only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 or FSDP2 has taken the parameter over."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter that may be sharded."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter that may be sharded."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: Iterable[torch.Tensor], write: bool = False) -> Iterator[list[torch.Tensor]]:
    """
    Have the whole values of `parameters` in the block. All processes must enter it.

    Args:
        parameters (iterable of `torch.Tensor`): Sharded or not.
        write (`bool`, *optional*, defaults to `False`): Whether the block changes them (in all processes alike).

    Yields:
        `list[torch.Tensor]`: The whole tensors. Gradients flow from them to the parameters.
    """
    parameters = list(parameters)
    zero = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(zero, modifier_rank=0 if write else None):
            yield parameters
        return
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    yield whole
    if write:
        for parameter, tensor in zip(parameters, whole, strict=True):
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(tensor, mesh, placements, src_data_rank=None))


def release_whole(model: nn.Module):
    """
    Let FSDP2 drop what it left whole after a forward pass. The model's parameters are the shards then, which is what
    optimizers change; the whole ones would be copies, in the dtype of mixed precision.
    """
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def renew_trainable(model: nn.Module):
    """
    Let FSDP2 see which parameters are trainable now. It takes the dtype of a layer's gradients from those that were so
    in the first forward pass, and otherwise looks again only when it is told to gather the layer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and any(parameter.requires_grad for parameter in module.parameters()):
            module.unshard()
            module.reshard()


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """State dict of a model that may be sharded, whole on the CPU of the main process and empty on the others."""
    if not any(map(is_sharded, model.parameters())):
        return model.state_dict()
    persistent = model.state_dict().keys()
    state = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    for name, parameter in model.named_parameters():
        with gathered([parameter]) as (whole,):
            if is_main_process():
                state[name] = whole.detach().to("cpu", copy=True)
    return state


@contextmanager
def runnable(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let a model that no training has wrapped do forward passes in the block, sharded if the run shards parameters."""
    if not is_zero3(accelerator):
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


def take_off_hooks(engine: Any):
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
    """Whether the run is under ZeRO-3 or FSDP2."""
    return accelerator.is_fsdp2 or is_zero3(accelerator)


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether the run is under DeepSpeed ZeRO-3."""
    return (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )


def prepare_fsdp(accelerator: Accelerator):
    """
    Check the run's FSDP settings, if it has any, and let its models put out what they compute.

    Raises:
        ValueError: If the models cannot be trained with them.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"`fsdp_version` is {plugin.fsdp_version}, but the two LoRAs are trained in turn, and FSDP1 cannot change "
            "what is trainable. Use 2."
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "`fsdp_cpu_ram_efficient_loading` is set, but each process needs the whole full model, and it would load it "
            "in one only. Set it to false."
        )
    if plugin.mixed_precision_policy is not None:
        # Accelerate has all outputs cast, the loss among them, which bfloat16 would round to three digits.
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)


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


def deal(
    batches: Sequence[list],
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[list, bool]]:
    """
    Deal batches out to the processes, the same number to each, so that they can run a sharded model together. Each time
    they are done with one, `on_progress` is called in all of them, with the numbers of batches done and to do.

    Yields:
        `tuple[list, bool]`: A batch and whether it counts: where they run out, the last is repeated for nothing.
    """
    for i in range(0, len(batches), accelerator.num_processes):
        mine = i + accelerator.process_index
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)
        on_progress(min(i + accelerator.num_processes, len(batches)), len(batches))


def summed(totals: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum of all processes' totals in float64, on the CPU: Apple's GPUs, of which there is one, know no float64."""
    return totals if accelerator.num_processes == 1 else accelerator.reduce(totals.to(accelerator.device)).cpu()
