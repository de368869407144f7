"""
A start of the emulator LoRA that is computed, not trained: each kept layer takes over from the dropped ones behind it.

Layer by layer, what a kept layer's output lacks (the full model's state that enters the next kept layer, less this output)
is regressed on the input of the linear whose output the layer adds to its own, the MLP's last one as a rule. The best
solution of the LoRA's rank becomes that linear's LoRA. It takes forward passes alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.functional import pad

from ..shared.lora_state import EMULATOR
from ..shared.losses import hidden_state_loss
from ..shared.processes import deal, gathered, summed
from .capture import capture, causal_lm, entering_at, wiring_of
from .split_check import two_texts
from .split_model import SplitModel
from .wiring import Wiring, bypassed


Batch = Mapping[str, torch.Tensor]  # `input_ids` and `attention_mask`, `(batch_size, sequence_length)`

# Times the mean of the diagonal of the inputs' Gram matrix. With 1e-2, text of another kind than the public is fitted worse.
RIDGE = 1e-1
PASSES = 3  # over the text, for each kept layer


@dataclass
class Regression:
    """
    Least squares with a ridge, of which only the Gram matrices are kept.

    Args:
        in_features, out_features (`int`): Sizes of the inputs and the targets.
        device (`torch.device`): Where the tokens are. So are the matrices, if it knows float64.
    """

    in_features: int
    out_features: int
    device: torch.device
    gram: torch.Tensor = field(init=False)
    products: torch.Tensor = field(init=False)

    def __post_init__(self):
        columns = self.in_features, self.out_features
        kind = {"dtype": torch.float64, "device": "cpu" if self.device.type == "mps" else self.device}
        self.gram, self.products = (torch.zeros(self.in_features, size, **kind) for size in columns)

    def add(self, x: torch.Tensor, y: torch.Tensor):
        """Add tokens: inputs `(num_tokens, in_features)` and targets `(num_tokens, out_features)`."""
        with torch.autocast(x.device.type, enabled=False):  # else a sum over all tokens in half precision
            self.gram += (x.T @ x).to(self.gram.device)
            self.products += (x.T @ y).to(self.products.device)

    def solve(self, rank: int, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The best weights of a rank: the solution of full rank on the directions in which what it fits varies most
        (reduced-rank regression).

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: A, `(rank, in_features)`, and B, `(out_features, rank)`, of equal norm.
        """
        gram = self.gram.clone()
        gram.diagonal().add_(ridge * self.gram.diagonal().mean())
        weights = torch.linalg.solve(gram, self.products).T
        _, directions = torch.linalg.eigh(weights @ gram @ weights.T)
        b = directions[:, -rank:]
        a = b.T @ weights
        balance = (a.norm() / b.norm()).sqrt() or 1.0
        unused = max(0, rank - b.shape[1])  # a rank above the number of outputs
        return pad(a / balance, (0, 0, 0, unused)), pad(b * balance, (0, unused))


@torch.no_grad()
def start_in_closed_form(
    models: SplitModel,
    linears: Mapping[int, "AddedLinear"],
    batches: Sequence[Batch],
    accelerator: Accelerator,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """
    Compute the emulator LoRA of some linears. On other modules it stays as it is: without effect, where it is new.

    Memory: two Gram matrices in float64, and on the CPU, for each token, what enters the next layer in both models.

    Args:
        models ([`SplitModel`]): The models.
        linears (`dict[int, AddedLinear]`): What [`find_added_linears`] has found.
        batches (sequence of `dict`): Padded public text, the same in all processes, which share it.
        accelerator (`Accelerator`): Tells processes, device and precision.
        on_progress (callable, *optional*): Called with the numbers of passes over a batch done and to do.

    Returns:
        `dict[str, float]`: `closed_form_tokens`, the size of the text, and `closed_form_l2`, the mean relative squared distance of the states that enter the adapter layers of this text.
    """
    training = models.adap_emu.training
    models.adap_emu.eval()
    try:
        with accelerator.autocast():
            fit = _Fit(models, linears, batches, accelerator, on_progress)
            with gathered(fit.full.around):  # which is the emulator's too
                return fit.run()
    finally:
        models.adap_emu.train(training)


class _Fit:
    """Goes through the layers of both models with all text, a layer at a time."""

    def __init__(self, models, linears, batches, accelerator, on_progress):
        self.linears, self.accelerator, self.on_progress, split = linears, accelerator, on_progress, models.split
        self.texts = [
            {name: batch[name].to(accelerator.device) for name in ("input_ids", "attention_mask")}
            for (batch,), _ in deal([[batch] for batch in batches], accelerator)
        ]
        # Where batches run out, a process has one that does not count.
        self.num_mine = len(range(accelerator.process_index, len(batches), accelerator.num_processes))
        wiring = wiring_of(models, self.texts[0])
        self.full, self.emulator = (
            PartialDecoder(model, split.layers_name, wiring) for model in (models.adap_fu, models.adap_emu)
        )
        followed_by = (*split.kept[1:], split.top_index)
        self.steps = list(zip(split.emulator_positions, split.kept, followed_by, strict=True))
        self.done, self.total = 0, PASSES * len(self.steps) * len(self.texts)
        # What enters the next layer, for each batch; from the embedding on at first.
        self.targets: list[torch.Tensor | None] = [None] * len(self.texts)
        self.states: list[torch.Tensor | None] = [None] * len(self.texts)

    def run(self) -> dict[str, float]:
        for position, index, following in self.steps:
            linear, layer = self.linears.get(position), self.emulator.layers[position]
            with gathered(self.full.layers[index:following].parameters()):
                self._run(self.full, index, following, self.targets)
            if linear is None:
                self._passed(len(self.texts))
            else:
                with gathered(layer.parameters()):
                    regression = self._regression(linear, position)
                linear.write(regression, self.accelerator)
            with gathered(layer.parameters()):
                self._run(self.emulator, position, position + 1, self.states)
        totals = torch.zeros(2, dtype=torch.float64)
        for text, target, states in list(zip(self.texts, self.targets, self.states, strict=True))[: self.num_mine]:
            mask = text["attention_mask"]
            distance = hidden_state_loss(self._hidden(states), self._hidden(target), mask)
            totals += torch.tensor([distance.item(), mask.sum().item()])
        l2, tokens = summed(totals, self.accelerator).tolist()
        return {"closed_form_tokens": tokens, "closed_form_l2": l2 / tokens}

    def _regression(self, linear: "AddedLinear", position: int) -> "Regression":
        regression = Regression(linear.module.in_features, linear.module.out_features, self.accelerator.device)
        for i, text in enumerate(self.texts):
            mask = text["attention_mask"].bool()
            with linear.watched() as seen:
                output = self.emulator.run(position, position + 1, text, self.states[i])
            if i < self.num_mine:
                x, y, target = (
                    states.to(torch.promote_types(states.dtype, torch.float32))
                    for states in (
                        seen[0].reshape(*mask.shape, -1)[mask],
                        self._hidden(output)[mask],
                        self._hidden(self.targets[i])[mask],
                    )
                )
                # As in the alignment loss, each token counts relative to its size; one without any does not count.
                size = target.pow(2).mean(-1, keepdim=True)
                scale = size.rsqrt().where(size > 0, 0.0)
                regression.add(x * scale, (target - y) * scale / linear.factor)
            self._passed()
        regression.gram, regression.products = map(self.accelerator.reduce, (regression.gram, regression.products))
        return regression

    def _run(self, decoder: "PartialDecoder", start: int, stop: int, states: list[torch.Tensor | None]):
        for i, text in enumerate(self.texts):
            states[i] = decoder.run(start, stop, text, states[i]).cpu()
            self._passed()

    def _hidden(self, states: torch.Tensor | None) -> torch.Tensor:
        """Hidden states, without what else a layer hands on."""
        return cast(torch.Tensor, states)[..., : self.emulator.hidden_size].to(self.accelerator.device)

    def _passed(self, batches: int = 1):
        self.done += batches
        self.on_progress(self.done, self.total)


@dataclass
class PartialDecoder:
    """
    A model whose decoder layers are run a few at a time. Under ZeRO-3 these must have been gathered, and what is around the
    layers.
    """

    model: PeftModel
    layers_name: str
    wiring: Wiring

    @property
    def around(self) -> list[nn.Parameter]:
        """The decoder's parameters of no layer: the embedding's and the last norm's."""
        inside = set(self.layers.parameters())
        return [parameter for parameter in causal_lm(self.model).base_model.parameters() if parameter not in inside]

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, causal_lm(self.model).get_submodule(self.layers_name))

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def run(self, start: int, stop: int, text: Batch, states: torch.Tensor | None) -> torch.Tensor:
        """
        What enters layer `stop` if `states` enter layer `start`, `(batch_size, sequence_length, width)`. Without states,
        from the embedding on.
        """
        with ExitStack() as stack:
            if states is not None:
                states = states.to(text["input_ids"].device)
                stack.enter_context(entering_at(self.model, self.layers_name, start, states, self.wiring))
            stack.enter_context(bypassed(self.layers, range(stop, len(self.layers)), self.wiring))
            seen = stack.enter_context(capture(self.model, self.layers_name, stop, self.wiring))
            causal_lm(self.model).base_model(**text, use_cache=False)
        return seen.states


@torch.no_grad()
def find_added_linears(models: SplitModel, device: torch.device) -> dict[int, "AddedLinear"]:
    """Those of the emulator's layers, by position, as two short texts show them. Some layers may have none."""
    split, texts = models.split, two_texts(models.adap_emu.config.get_text_config().vocab_size, device)
    training = models.adap_emu.training
    models.adap_emu.eval()
    try:
        decoder = PartialDecoder(models.adap_emu, split.layers_name, wiring_of(models, texts))
        states, found = None, {}
        with gathered(decoder.around):
            for position in split.emulator_positions:
                with gathered(decoder.layers[position].parameters()):
                    linear = AddedLinear.find(decoder, position, texts, states)
                    if linear is not None:
                        found[position] = linear
                    states = decoder.run(position, position + 1, texts, states)
        return found
    finally:
        models.adap_emu.train(training)


@dataclass
class AddedLinear:
    """
    A linear of a decoder layer, with an emulator LoRA on it, whose output the layer adds to its own.

    Attributes:
        module ([`~peft.tuners.lora.LoraLayer`]): The linear.
        factor (`float`): What the layer multiplies its output with before.
    """

    module: Any
    factor: float

    @classmethod
    def find(
        cls, decoder: PartialDecoder, position: int, text: Batch, states: torch.Tensor | None
    ) -> "AddedLinear | None":
        """
        Look for it in layer `position`: add something to a linear's output, and see whether it is added to the layer's.
        Of several, the one with the most inputs.
        """
        run = lambda: decoder.run(position, position + 1, text, states)[..., : decoder.hidden_size].float()  # noqa: E731
        before = run()
        probe = before.flip(-1)  # as large as the states are
        for module in candidates(decoder.layers[position], decoder.hidden_size):
            hook = module.register_forward_hook(lambda module, args, y: y + probe.reshape(y.shape).to(y.dtype))
            try:
                change = run() - before
            finally:
                hook.remove()
            factor = ((change * probe).sum() / probe.pow(2).sum()).item()
            if (change - factor * probe).norm() < 0.05 * abs(factor) * probe.norm():
                return cls(module, factor)
        return None

    @contextmanager
    def watched(self) -> Iterator[list[torch.Tensor]]:
        """Keep the inputs of the forward passes in the block."""
        seen: list[torch.Tensor] = []
        hook = self.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def write(self, regression: Regression, accelerator: Accelerator):
        """Make the solution its LoRA, the same in all processes."""
        a, b = (broadcast(tensor.contiguous()) for tensor in regression.solve(self.module.r[EMULATOR]))
        weights = self.module.lora_A[EMULATOR].weight, self.module.lora_B[EMULATOR].weight
        with gathered(weights, write=True) as (whole_a, whole_b):
            whole_a.copy_(a)
            whole_b.copy_(b / self.module.scaling[EMULATOR])


def candidates(layer: nn.Module, hidden_size: int) -> list[Any]:
    """Linears with an emulator LoRA whose output a layer may add to its own, those with the most inputs first."""
    found = [
        module
        for module in layer.modules()
        if isinstance(module, LoraLayer)
        and EMULATOR in module.lora_A
        and EMULATOR not in module.lora_variant  # whose products are more than B A
        and module.out_features == hidden_size
    ]
    return sorted(found, key=lambda module: -module.in_features)
