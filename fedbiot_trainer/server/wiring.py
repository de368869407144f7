"""What decoder layers hand on to one another, so that some of them can be left out or run alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


Slot = int | str  # an argument, by position or name


@dataclass(frozen=True)
class Wiring:
    """
    What the layers of a decoder hand on. Without arguments: hidden states alone, as they are.

    Attributes:
        slots (`tuple[int | str | None, ...]`): For each value that a layer returns, the next layer's argument that it
            becomes; `None` if it goes elsewhere. Hidden states come first.
        bare (`bool`): Whether a layer returns the hidden states as they are, not in a tuple.
        carried (`tuple[tuple[int | str, int], ...]`): Which of these arguments hold a vector for each token as well, and
            how long it is.
    """

    slots: tuple[Slot | None, ...] = (None,)
    bare: bool = True
    carried: tuple[tuple[Slot, int], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, layers_name: str, run: Callable[[], Any]) -> "Wiring":
        """
        Watch the decoder layers in a forward pass.

        Raises:
            ValueError: If they differ in what they return.
        """
        calls = []
        watch = lambda layer, args, kwargs, output: calls.append((_by_slot(args, kwargs), output))  # noqa: E731
        hooks = [layer.register_forward_hook(watch, with_kwargs=True) for layer in model.get_submodule(layers_name)]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        forms = {len(output) if isinstance(output, (tuple, list)) else 0 for _, output in calls}
        if len(forms) != 1:
            raise ValueError(
                f"`model` is {type(model).__name__}, whose decoder layers return different numbers of values "
                f"({', '.join(map(str, sorted(forms))) or 'none was run'}), so none can be left out or run alone."
            )
        slots: dict[int, Slot] = {}
        carried: dict[Slot, int] = {}
        for (_, output), (arguments, _) in pairwise(calls):
            values = output if isinstance(output, (tuple, list)) else (output,)
            for i, value in enumerate(values):
                slot = next((slot for slot, given in arguments.items() if given is value), None)
                if isinstance(value, torch.Tensor) and slot is not None:
                    slots.setdefault(i, slot)
                    if i > 0 and value.is_floating_point() and value.shape[:-1] == values[0].shape[:-1]:
                        carried[slot] = value.shape[-1]
        return cls(tuple(slots.get(i) for i in range(max(1, *forms))), forms == {0}, tuple(carried.items()))

    def _hidden_slot(self, args: tuple) -> Slot:
        return (0 if args else "hidden_states") if self.slots[0] is None else self.slots[0]

    def entering(self, args: tuple, kwargs: dict) -> list[torch.Tensor]:
        """What a layer with these arguments was handed on: hidden states, then what is carried."""
        arguments = _by_slot(args, kwargs)
        return [arguments[self._hidden_slot(args)], *(arguments[slot] for slot, _ in self.carried)]

    def replace(self, args: tuple, kwargs: dict, states: torch.Tensor) -> tuple[tuple, dict]:
        """The same arguments with other values of these, side by side in `states`."""
        widths = [width for _, width in self.carried]
        values = states.split([states.shape[-1] - sum(widths), *widths], dim=-1) if widths else [states]
        others, kwargs = list(args), dict(kwargs)
        for slot, value in zip([self._hidden_slot(args), *(slot for slot, _ in self.carried)], values, strict=True):
            if isinstance(slot, int):
                others[slot] = value
            else:
                kwargs[slot] = value
        return tuple(others), kwargs

    def pass_through(self, *args, **kwargs):
        """A layer's forward that hands on what it is given."""
        arguments = _by_slot(args, kwargs)
        hidden = arguments[self._hidden_slot(args)]
        return hidden if self.bare else (hidden, *(arguments.get(slot) for slot in self.slots[1:]))


def _by_slot(args: Sequence, kwargs: dict) -> dict[Slot, Any]:
    return {**dict(enumerate(args)), **kwargs}


@contextmanager
def bypassed(layers: nn.ModuleList, indices: Iterable[int], wiring: Wiring) -> Iterator[None]:
    """Run the decoder without the layers `indices`: each hands on what it is given."""
    left_out = [layers[index] for index in indices]
    try:
        for layer in left_out:
            layer.forward = wiring.pass_through
        yield
    finally:
        for layer in left_out:
            vars(layer).pop("forward", None)
