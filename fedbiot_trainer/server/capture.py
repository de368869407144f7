"""Parts of a forward pass: what enters the adapter layers, what leaves the decoder, the output head alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..shared.processes import gathered
from .split_model import SplitModel
from .wiring import Wiring, bypassed


HIDDEN_ALONE = Wiring()


@dataclass
class Captured:
    """
    What [`capture`] saw of one forward pass.

    Attributes:
        entering (`torch.Tensor`): Hidden states that enter the adapter layers, `(batch_size, sequence_length,
            hidden_size)`.
        last (`torch.Tensor`): Hidden states that enter the output head, of the same shape.
        carried (`list[torch.Tensor]`): What else the layers below hand on to the adapter layers.
    """

    entering: torch.Tensor = field(init=False)
    last: torch.Tensor = field(init=False)
    carried: list[torch.Tensor] = field(default_factory=list)

    @property
    def states(self) -> torch.Tensor:
        """All that enters the adapter layers, side by side, `(batch_size, sequence_length, width)`."""
        return torch.cat([self.entering, *self.carried], dim=-1) if self.carried else self.entering


def causal_lm(model: PeftModel) -> PreTrainedModel:
    """The causal LM under the LoRAs."""
    return model.get_base_model()


@contextmanager
def capture(model: PeftModel, layers_name: str, index: int, wiring: Wiring = HIDDEN_ALONE) -> Iterator[Captured]:
    """Keep what enters decoder layer `index`, and what the decoder puts out."""
    captured = Captured()
    model, (decoder_name, _, _) = causal_lm(model), layers_name.rpartition(".")

    def enter(module, args, kwargs):
        captured.entering, *captured.carried = wiring.entering(args, kwargs)

    def leave(module, args, output):
        captured.last = output[0]

    hooks = [
        model.get_submodule(layers_name)[index].register_forward_pre_hook(enter, with_kwargs=True),
        model.get_submodule(decoder_name).register_forward_hook(leave),
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def entering_at(
    model: PeftModel, layers_name: str, index: int, states: torch.Tensor, wiring: Wiring = HIDDEN_ALONE
) -> Iterator[None]:
    """Let the decoder start at layer `index`, with `states` ([`Captured.states`]) entering there."""
    layers = causal_lm(model).get_submodule(layers_name)

    def enter(module, args, kwargs):
        return wiring.replace(args, kwargs, states)

    hook = layers[index].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with bypassed(layers, range(index), wiring):
            yield
    finally:
        hook.remove()


class OutputHead:
    """
    The output head of a causal LM as a function of hidden states, for use on any part of a batch.

    Args:
        model (`PreTrainedModel`): The causal LM. Its logits are `scale * head(states)`, soft-capped where its config
            says so.
    """

    def __init__(self, model: PreTrainedModel):
        self.layer = model.get_output_embeddings()
        config = model.config.get_text_config()
        softcaps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
        self.softcap = next(filter(None, softcaps), None)
        scales = (getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier"))
        self.scale = next(filter(None, scales), 1.0)
        if getattr(config, "logits_scaling", None):
            self.scale = 1 / config.logits_scaling

    @torch.no_grad()
    def check(self, models: SplitModel, device: torch.device):
        """
        Compare with what the emulator, which has this head, makes of a few tokens.

        Raises:
            ValueError: If its logits are others.
        """
        adap_emu, split = models.adap_emu.eval(), models.split
        tokens = torch.arange(8, device=device)[None] % adap_emu.config.get_text_config().vocab_size
        with capture(adap_emu, split.layers_name, split.top_position) as seen:
            own = adap_emu(input_ids=tokens, use_cache=False).logits.float()
        with self.whole() as logits:
            other = logits(seen.last) if seen.last.shape[-1] == self.layer.weight.shape[-1] else None
        if other is None or (own - other).abs().max() > 0.02 * own.abs().max():
            raise ValueError(
                f"The logits of {type(causal_lm(adap_emu)).__name__} are more than its output head: something scales or caps them in a "
                "way that is not known here, so the KL divergence would compare other distributions. Set "
                "`alignment_kl_weight=0`, and leave `eval_drift` and `plug_in_steps` out."
            )

    @contextmanager
    def whole(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The function `(num_tokens, hidden_size) -> (num_tokens, vocab_size)`, in float32."""
        with gathered(self.layer.parameters()):
            yield self._logits

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states.to(self.layer.weight.dtype), self.layer.weight, self.layer.bias).float()
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def wiring_of(models: SplitModel, inputs: dict[str, torch.Tensor]) -> Wiring:
    """How the layers are wired, seen with `inputs` the first time that it is asked."""
    if models.wiring is None:
        adap_emu = models.adap_emu
        run = lambda: causal_lm(adap_emu).base_model(**inputs, use_cache=False)  # noqa: E731
        with torch.no_grad():
            models.wiring = Wiring.of(causal_lm(adap_emu), models.split.layers_name, run)
    return models.wiring


@torch.no_grad()
def run_full_model(models: SplitModel, inputs: dict[str, torch.Tensor]) -> Captured:
    """The hidden states of the full model, with the client LoRA in it, for `input_ids` and `attention_mask`."""
    full, split = models.adap_fu, models.split
    with capture(full, split.layers_name, split.top_index, models.wiring or HIDDEN_ALONE) as captured:
        causal_lm(full).base_model(**inputs, use_cache=False)
    return captured


@torch.no_grad()
def run_adapter_layers(models: SplitModel, inputs: dict[str, torch.Tensor], states: torch.Tensor) -> Captured:
    """
    The same from what enters the adapter layers, without the layers below.

    Args:
        models ([`SplitModel`]): Its emulator is used, which has the full model's adapter layers and the client LoRA.
        inputs (`dict`): `input_ids` and `attention_mask` of the batch, `(batch_size, sequence_length)`.
        states (`torch.Tensor`): What enters the adapter layers in the full model, [`Captured.states`], `(batch_size,
            sequence_length, width)`.
    """
    adap_emu, split = models.adap_emu, models.split
    wiring, whole_model = wiring_of(models, inputs), cast(Any, adap_emu)
    with (
        entering_at(adap_emu, split.layers_name, split.top_position, states, wiring),
        capture(adap_emu, split.layers_name, split.top_position, wiring) as captured,
    ):
        if isinstance(adap_emu, FSDPModule):  # must see the forward pass of the whole model; no logits are wanted
            whole_model(
                **inputs, use_cache=False, logits_to_keep=torch.empty(0, dtype=torch.long, device=states.device)
            )
        else:
            causal_lm(adap_emu).base_model(**inputs, use_cache=False)
    return captured
