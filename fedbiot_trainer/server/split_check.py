"""Whether an architecture computes what the split supposes: found out at the start, on two short texts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer

from .capture import capture, causal_lm, run_adapter_layers, wiring_of
from .split_model import SplitModel
from .wiring import bypassed


@torch.no_grad()
def check_split(models: SplitModel, device: torch.device, compare_full: bool = True, cached: bool = True):
    """
    Check that the emulator is the full model without its dropped layers, that each LoRA is used, and that the adapter
    layers can be run apart from the emulator. Costs four forward passes of the emulator over 16 tokens.

    Args:
        models ([`SplitModel`]): The models, on `device`.
        device (`torch.device`): Where they are.
        compare_full (`bool`, *optional*, defaults to `True`): Whether the full model can be run.
        cached (`bool`, *optional*, defaults to `True`): Whether the teacher will run the adapter layers alone.

    Raises:
        ValueError: If the architecture does something else.
    """
    split, adap_emu = models.split, models.adap_emu
    name = type(causal_lm(adap_emu)).__name__
    texts = two_texts(adap_emu.config.get_text_config().vocab_size, device)
    layers_name, top = split.layers_name, split.top_position
    training = adap_emu.training
    try:
        _refuse_unused_loras(models, texts, name)
        adap_emu.eval()
        wiring = wiring_of(models, texts)
        with _named(name), capture(adap_emu, layers_name, top, wiring) as seen:
            causal_lm(adap_emu).base_model(**texts)  # with the cache of generation, if it has one
        if seen.entering.shape != (*texts["input_ids"].shape, adap_emu.config.get_text_config().hidden_size):
            raise ValueError(
                f"`model` is {name}, in which a tensor of shape {tuple(seen.entering.shape)} enters the adapter layers "
                f"for {tuple(texts['input_ids'].shape)} tokens rather than one hidden state for each, so the emulator "
                "cannot be aligned. This architecture is not supported."
            )
        mask = texts["attention_mask"].bool()
        if compare_full and split.dropped:
            full = models.adap_fu.eval()
            layers = causal_lm(full).get_submodule(layers_name)
            with (
                _named(name),
                bypassed(layers, split.dropped, wiring),
                capture(full, layers_name, split.top_index) as expected,
            ):
                causal_lm(full).base_model(**texts, use_cache=False)
            if not _same(seen.last[mask], expected.last[mask]):
                raise ValueError(
                    f"`model` is {name}, in which dropping layers changes what the others compute: the emulator is not "
                    "the full model without them. This architecture is supported with `emulator_drop_ratio=0` only."
                )
        if cached:
            with _named(name):
                alone = run_adapter_layers(models, texts, seen.states)
            if not _same(seen.last[mask], alone.last[mask]):
                raise ValueError(
                    f"`model` is {name}, whose adapter layers need more of the layers below than a vector for each "
                    "token, so they cannot be run from stored hidden states. Set `teacher='online'`."
                )
    finally:
        adap_emu.train(training)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which model it is what a model raises that cannot run without some of its layers."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`model` is {name}, whose decoder cannot run without some of its layers ({type(error).__name__}: {error}). "
            "Keep others, with another `emulator_drop_ratio` or `num_adapter_layers`, if that helps; otherwise this "
            "architecture is not supported."
        ) from error


def two_texts(vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of 8 and 6 tokens."""
    tokens = (3 + 5 * torch.arange(16, device=device).view(2, 8)) % vocab_size
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    # The same operations on the same numbers, up to the order of sums on some devices.
    tolerance = 1e-3 if a.dtype == torch.float32 else 2e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max())


def _refuse_unused_loras(models: SplitModel, texts: dict[str, torch.Tensor], name: str):
    """
    Raise if a LoRA is on modules that training does not call: kernels of state-space layers take their weights alone.
    Of experts, some may get no token.
    """
    loras = {path: module for path, module in models.adap_emu.named_modules() if isinstance(module, LoraLayer)}
    called = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path)) for path, module in loras.items()
    ]
    try:
        with _named(name), _random_state_kept(texts["input_ids"].device):
            causal_lm(models.adap_emu.train()).base_model(**texts, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    alike = lambda path: re.sub(r"\.\d+(?=\.)", ".*", path)  # noqa: E731
    unused = sorted({alike(path) for path in loras} - {alike(path) for path in called})
    if unused:
        modules = ", ".join(sorted({path.rpartition(".")[2] for path in unused}))
        raise ValueError(
            f"`target_modules` has {modules}, but {name} takes the weights of these modules without calling them, so "
            "that a LoRA on them would not be trained. Leave them out."
        )


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
