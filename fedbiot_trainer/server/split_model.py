"""The full model and its emulator, with the LoRAs of FedBiOT on them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config.settings import SplitSettings
from ..shared.lora_layers import fuse_loras
from ..shared.lora_state import CLIENT, EMULATOR, LoraState, add_loras, get_lora_state, set_lora_state
from ..shared.quantized import num_weights, refuse_unsavable
from ..shared.records import ParameterCounts
from ..shared.tokenizers import align_model
from ..wire.package import EmulatorPackage
from .layer_dropping import drop_layers
from .lora_placement import DEFAULT_LORA, check_placement, place_loras, with_rank
from .split import check_full_model, choose_split
from .wiring import Wiring


class SplitModel:
    """
    A full model and its emulator, with the LoRAs of FedBiOT on them. All frozen tensors are shared.

    Args:
        model (`PreTrainedModel`): The full model. It is not changed.
        num_adapter_layers (`int`), emulator_drop_ratio (`float`), num_adapter_layers_bottom (`int`): As in
            [`SplitSettings`].
        peft_config, emulator_peft_config ([`~peft.LoraConfig`], *optional*): The two LoRAs, the second like the first by
            default.
        with_output_linears (`bool`, *optional*, defaults to `False`): Whether the emulator LoRA is also on the linears for
            which [`start_in_closed_form`] can compute it, if layers are dropped.

    Attributes:
        split ([`LayerSplit`]): Which layers are where.
        package_model (`PreTrainedModel`): Emulator + adapter layers without any LoRA, as clients receive it.
        adap_emu (`PeftModel`): Emulator + adapter layers with the client LoRA and the emulator LoRA active.
        adap_fu (`PeftModel`): The full model with the client LoRA at the full model's layer indices.
        wiring ([`Wiring`], *optional*): What decoder layers hand on to one another, once a forward pass has shown it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_adapter_layers: int,
        emulator_drop_ratio: float,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        num_adapter_layers_bottom: int = 0,
        with_output_linears: bool = False,
    ):
        check_full_model(model)
        refuse_unsavable(model)
        self.split = choose_split(model, num_adapter_layers, emulator_drop_ratio, num_adapter_layers_bottom)
        peft_config = peft_config or LoraConfig(**DEFAULT_LORA)
        client, emulator = place_loras(model, self.split, peft_config, emulator_peft_config)
        self.package_model = drop_layers(model, self.split)
        placed = {CLIENT: client.renamed(self.split.to_emulator)}
        configs = [placed[CLIENT].peft_config(self.package_model), None]
        if emulator is not None:
            if with_output_linears and self.split.dropped:
                emulator = emulator.with_output_linears(model, self.split.kept)
            placed[EMULATOR] = emulator.renamed(self.split.to_emulator)
            # Alignment is a regression on fixed targets, and clients run the emulator LoRA frozen: no dropout in either.
            configs[1] = placed[EMULATOR].peft_config(self.package_model, lora_dropout=0.0)
        self.adap_emu = add_loras(drop_layers(model, self.split), *configs)
        twin = drop_layers(model, self.split.without_drops())
        self.adap_fu = fuse_loras(get_peft_model(twin, client.peft_config(twin), adapter_name=CLIENT))
        check_placement(self.adap_fu, CLIENT, client)
        for lora_name, placement in placed.items():
            check_placement(self.adap_emu, lora_name, placement)
        self.adap_fu.requires_grad_(False)
        self.adap_fu.eval()
        self.wiring: Wiring | None = None
        self._offloaded = False
        self.plug_in(get_lora_state(self.adap_emu, CLIENT))

    def move(self, device: torch.device, offload: bool = False):
        """
        Move the models to a device.

        Args:
            device (`torch.device`): Where everything that clients have as well goes.
            offload (`bool`, *optional*, defaults to `False`): Whether the layers that only the full model has stay on
                the CPU. It can only run within [`whole_on`] then.
        """
        self._offloaded = offload
        layers = self.adap_fu.get_base_model().get_submodule(self.split.layers_name)
        dropped = [layers[i] for i in self.split.dropped]
        # Shared `Parameter` objects are moved in place, so the full model sees it. Its buffers are its own.
        self.adap_emu.to(device)
        if offload:
            inside = {id(module) for layer in dropped for module in layer.modules()}
            for module in self.adap_fu.modules():
                if id(module) not in inside:
                    for name, buffer in list(module.named_buffers(recurse=False)):
                        setattr(module, name, buffer.to(device))
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(device)
        else:
            self.adap_fu.to(device)

    def align_tokens(self, tokenizer: PreTrainedTokenizerBase, args: SFTConfig):
        """Let the configurations of all three models name the end token that `args` ask for."""
        for model in (self.package_model, self.adap_emu, self.adap_fu):
            align_model(model, tokenizer, args)

    @classmethod
    def from_config(
        cls,
        model: PreTrainedModel,
        settings: SplitSettings,
        peft_config: LoraConfig | None = None,
        emulator_peft_config: LoraConfig | None = None,
        with_output_linears: bool = False,
    ) -> "SplitModel":
        """Split `model` as `settings` say. An emulator LoRA that is given goes where it says, and nowhere else."""
        with_output_linears = with_output_linears and emulator_peft_config is None
        if settings.emulator_lora_r is not None:
            emulator_peft_config = with_rank(emulator_peft_config or peft_config, settings.emulator_lora_r)
        return cls(
            model,
            settings.num_adapter_layers,
            settings.emulator_drop_ratio,
            peft_config,
            emulator_peft_config,
            settings.num_adapter_layers_bottom,
            with_output_linears,
        )

    @contextmanager
    def whole_on(self, device: torch.device) -> Iterator[None]:
        """Have the whole full model on `device` in the block."""
        layers = self.adap_fu.get_base_model().get_submodule(self.split.layers_name)
        dropped = [layers[i] for i in self.split.dropped] if self._offloaded else []
        try:
            for layer in dropped:
                layer.to(device)
            yield
        finally:
            for layer in dropped:
                layer.to("cpu")

    def plug_in(self, client_lora: LoraState):
        """Put a client LoRA (keys of the emulator) into the full model."""
        set_lora_state(self.adap_fu, CLIENT, self.split.to_full(client_lora))

    def extract(self) -> LoraState:
        """The client LoRA in the full model, with the emulator's keys. Inverse of [`plug_in`]."""
        return self.split.to_emulator(get_lora_state(self.adap_fu, CLIENT))

    def package(self, client_lora: LoraState, emulator_lora: LoraState) -> EmulatorPackage:
        """What clients are given once, with the given states of the LoRAs."""
        return EmulatorPackage(
            self.package_model,
            self.split.num_adapter_layers,
            self.adap_emu.peft_config[CLIENT],
            self.adap_emu.peft_config.get(EMULATOR),
            client_lora,
            emulator_lora,
            self.split.num_adapter_layers_bottom,
        )

    def count_parameters(self) -> ParameterCounts:
        """Parameters of the parts; shared tensors count once."""
        lora = dict.fromkeys((CLIENT, EMULATOR), 0)
        for name, parameter in self.adap_emu.named_parameters():
            for lora_name in lora:
                lora[lora_name] += num_weights(parameter) if f".{lora_name}." in name and "lora_" in name else 0
        layers = self.package_model.get_submodule(self.split.layers_name)
        return ParameterCounts(
            full=sum(num_weights(p) for name, p in self.adap_fu.named_parameters() if "lora_" not in name),
            adap_emu=sum(num_weights(p) for p in self.package_model.parameters()),
            adapter_layers=sum(num_weights(p) for i in self.split.adapter_positions for p in layers[i].parameters()),
            trainable_client=lora[CLIENT],
            trainable_server=lora[EMULATOR],
        )
