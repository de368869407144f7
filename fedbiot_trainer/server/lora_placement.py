"""
Where the two LoRAs go: module by module, decided here and checked after PEFT has put them on.

PEFT reads names, patterns and layer numbers, and reads them differently for mixtures of experts, vision towers and full
paths. So a user's configuration is resolved once, on the full model, to the modules of the adapter layers or of the
emulator, and PEFT is given the shortest configuration that it reads as exactly these.
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import peft
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..shared.compat import loads_loras
from ..shared.quantized import is_linear
from .lora_options import check_lora_options
from .lora_targets import output_linear, renamed_by_peft, usable_linears, weight_is_taken
from .split import LayerSplit


logger = logging.get_logger(__name__)

DEFAULT_LORA = {"r": 8, "lora_alpha": 16}
EVERY = ".*"


def with_rank(config: LoraConfig | None, r: int) -> LoraConfig:
    """
    A copy of `config` with another rank and the same `lora_alpha / r`.

    Raises:
        ValueError: If it has ranks or alphas of single modules.
    """
    config = copy.deepcopy(config or LoraConfig(**DEFAULT_LORA))
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise ValueError(
                f"`emulator_lora_r` is {r}, but `{name}` gives single modules their own. Leave it out, and pass the emulator LoRA "
                "as `emulator_peft_config`."
            )
    config.lora_alpha, config.r = config.lora_alpha * r / config.r, r
    return config


@dataclass(frozen=True)
class LoraPlacement:
    """
    The modules that get a LoRA.

    Attributes:
        config ([`~peft.LoraConfig`]): All that does not depend on the module.
        layers_name (`str`): Qualified name of the decoder layers.
        modules (`dict[str, tuple[int, float]]`): Rank and alpha by qualified name, in a model of which it is.
    """

    config: LoraConfig
    layers_name: str
    modules: dict[str, tuple[int, float]]

    def renamed(self, rename: Callable[[dict], dict]) -> "LoraPlacement":
        """The same in a model whose layers have other positions, e.g. with [`LayerSplit.to_emulator`]."""
        return LoraPlacement(self.config, self.layers_name, rename(self.modules))

    def with_output_linears(self, model: PreTrainedModel, layers: Iterable[int]) -> "LoraPlacement":
        """The same with the linear whose output a layer adds to its own ([`output_linear`]), of the decoder layers `layers`."""
        names = (output_linear(model, f"{self.layers_name}.{index}") for index in layers)
        modules = dict.fromkeys(filter(None, names), (self.config.r, self.config.lora_alpha)) | self.modules
        return LoraPlacement(self.config, self.layers_name, modules)

    def peft_config(self, model: nn.Module, **changes) -> LoraConfig:
        """
        The shortest configuration that PEFT reads as exactly these modules of `model`: last parts of their names with
        the numbers of their layers, names within a layer, or full names.
        """
        config = copy.deepcopy(self.config)
        config.task_type = "CAUSAL_LM"
        config.exclude_modules = None
        config.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in self.modules)
        for attribute, value in changes.items():
            setattr(config, attribute, value)
        ranks = {name: r for name, (r, _) in self.modules.items()}
        alphas = {name: alpha for name, (_, alpha) in self.modules.items()}
        config.rank_pattern = {re.escape(name): r for name, r in ranks.items() if r != config.r}
        config.alpha_pattern = {re.escape(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}
        positions, inside = zip(*(_layer_and_name(name, self.layers_name) for name in self.modules), strict=True)
        for names in ({name.rpartition(".")[2] for name in inside}, set(inside), set(self.modules)):
            config.target_modules = sorted(names)
            config.layers_to_transform, config.layers_pattern = None, None
            if names != self.modules.keys():
                config.layers_to_transform = sorted(set(positions))
                config.layers_pattern = [self.layers_name.rpartition(".")[2]]
            read = {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}
            if read == self.modules.keys():
                break
        return config


def place_loras(
    model: PreTrainedModel, split: LayerSplit, peft_config: LoraConfig, emulator_peft_config: LoraConfig | None = None
) -> tuple[LoraPlacement, LoraPlacement | None]:
    """
    Decide where the client LoRA and the emulator LoRA go.

    Args:
        model (`PreTrainedModel`): The full model.
        split ([`LayerSplit`]): Its split.
        peft_config ([`~peft.LoraConfig`]): The client LoRA. `target_modules` may be `None` (PEFT's choice for the
            architecture where every layer has such modules, else all linear layers), `"all-linear"`, names, full names
            or a regular expression, as may `exclude_modules`; patterns may name layers of the full model.
        emulator_peft_config ([`~peft.LoraConfig`], *optional*): The emulator LoRA. Defaults to `peft_config`.

    Returns:
        Two [`LoraPlacement`]s, in names of the full model. The second is `None` if there is no emulator.

    Raises:
        TypeError: If it is not a `LoraConfig`.
        ValueError: If an option is not known to be right, a part of it names nothing, or a LoRA would be on no module.
    """
    configs = {"peft_config": peft_config}
    if emulator_peft_config is not None:
        configs["emulator_peft_config"] = emulator_peft_config
    for argument, config in configs.items():
        check_lora_options(config, argument)
    if not loads_loras(model):
        raise ValueError(
            f"`model` is {type(model).__name__}, a mixture of experts, of which PEFT {peft.__version__} can load no LoRA "
            "with this version of transformers. Upgrade it: `pip install 'peft>=0.20'`."
        )
    client = place_lora(peft_config, model, split, split.adapter_indices)
    emulator = None
    if split.kept:
        emulator = place_lora(emulator_peft_config or peft_config, model, split, split.kept, "emulator")
    for argument, config in configs.items():
        _refuse_names_of_nothing(config, argument, model, split)
    return client, emulator


def place_lora(
    config: LoraConfig, model: PreTrainedModel, split: LayerSplit, layers: Iterable[int], whose: str = "adapter"
) -> LoraPlacement:
    """
    Resolve a checked configuration to modules of the decoder layers `layers` of the full model.

    Raises:
        ValueError: If it matches none, or such that PEFT puts it on other layers as well.
    """
    linears = [usable_linears(model, f"{split.layers_name}.{index}") for index in layers]
    targets, chosen = _targets(config, model, linears)
    reads = _reader(targets, config.exclude_modules)
    matched = [name for names in linears for name in names if reads(name)]
    named = [] if isinstance(targets, str) else targets
    renamed = sorted({name for name in map(_last, [*matched, *named]) if renamed_by_peft(model, name)})
    if renamed and not chosen:
        raise ValueError(
            f"`target_modules` is {_shown(targets)}, but in {type(model).__name__} PEFT takes {', '.join(renamed)} for "
            "weights of the experts, which it puts a LoRA on in all layers. Leave them out, or use 'all-linear' for "
            "what can be trained on some layers alone."
        )
    matched = [name for name in matched if _last(name) not in renamed]
    if chosen:
        matched = [name for name in matched if not weight_is_taken(model, name)]
    if not matched:
        inside = sorted({_layer_and_name(name, split.layers_name)[1] for names in linears for name in names})
        hint = "" if whose == "adapter" else " The emulator LoRA takes its own as `emulator_peft_config`."
        raise ValueError(
            f"`target_modules` is {_shown(config.target_modules)}, which matches no linear layer in the {whose} layers "
            f"{list(layers)} of {type(model).__name__}. There are: {', '.join(inside) or 'none'}.{hint}"
        )
    if targets == EVERY:
        _warn_of_experts(model, split, layers, renamed)
    modules = {
        name: (
            config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r),
            config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha),
        )
        for name in matched
    }
    return LoraPlacement(config, split.layers_name, modules)


def _targets(config: LoraConfig, model: PreTrainedModel, linears: list[list[str]]) -> tuple[str | list[str], bool]:
    """Names or a pattern for PEFT, and whether they were left to this library."""
    given = config.target_modules
    if given is None:
        known = _peft_choice(model)
        # Of a hybrid, some layers may have no such modules.
        if known and all(any(map(_reader(known), names)) for names in linears):
            return known, True
        return EVERY, True
    return (EVERY, True) if isinstance(given, str) and given.lower() == "all-linear" else (given, False)


def check_placement(model: PeftModel, lora_name: str, placement: LoraPlacement):
    """
    Check that PEFT has put a LoRA where it should be, with the ranks and scalings it should have.

    Raises:
        ValueError: If not.
    """
    base = model.get_base_model()
    found = {
        name: (module.r[lora_name], module.lora_alpha[lora_name])
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and lora_name in module.r
    }
    if found != placement.modules:
        odd = [name for name in {**found, **placement.modules} if found.get(name) != placement.modules.get(name)]
        raise ValueError(
            f"`model` is {type(base).__name__}, on which PEFT puts the {lora_name} LoRA elsewhere than the split says: "
            f"{len(odd)} modules differ, first `{odd[0]}` ((rank, alpha) {found.get(odd[0])} instead of "
            f"{placement.modules.get(odd[0])}). Name other `target_modules`."
        )


def _refuse_names_of_nothing(config: LoraConfig, argument: str, model: PreTrainedModel, split: LayerSplit):
    """Raise if a name or pattern in `config` is for no module: it would be left out without a word."""
    layers = sorted({*split.kept, *split.adapter_indices})
    linear = [name for index in layers for name in usable_linears(model, f"{split.layers_name}.{index}")]
    every = [name for name, _ in model.named_modules() if name]
    entries = [("target_modules", target, _reader([target])) for target in _entries(config.target_modules)]
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            entries.append((field, pattern, partial(_is_meant, pattern)))
    excluded = config.exclude_modules
    entries += [("exclude_modules", name, _reader([name])) for name in _entries(excluded)]
    if isinstance(excluded, str):
        entries.append(("exclude_modules", excluded, _reader(excluded)))
    nothing: dict[str, list[str]] = {}
    for field, entry, reads in entries:
        if not any(map(reads, every if field == "exclude_modules" else linear)):
            nothing.setdefault(field, []).append(f"'{entry}'")
    if nothing:
        inside = sorted({_layer_and_name(name, split.layers_name)[1] for name in linear})
        named = "; ".join(f"`{field}` has {', '.join(names)}" for field, names in nothing.items())
        matches = "which matches" if sum(map(len, nothing.values())) == 1 else "which match"
        raise ValueError(
            f"{named} in `{argument}`, {matches} no linear layer of {type(model).__name__} in the decoder layers {layers}, "
            f"which are kept. There are: {', '.join(inside)}."
        )


def _is_meant(pattern: str, name: str) -> bool:
    return get_pattern_key([pattern], name) == pattern


def _entries(names) -> list[str]:
    return [] if names is None or isinstance(names, str) else sorted(names)


def _peft_choice(model: PreTrainedModel) -> str | list[str] | None:
    for config in (model.config, model.config.get_text_config()):
        if config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            return TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[config.model_type]
    return None


def _reader(targets, excluded=None) -> Callable[[str], bool]:
    """Whether PEFT reads `targets`, less `excluded`, as naming a module of the full model."""
    config = LoraConfig(target_modules=targets, exclude_modules=excluded)
    return lambda name: bool(check_target_module_exists(config, name))


def _warn_of_experts(model: PreTrainedModel, split: LayerSplit, layers: Iterable[int], renamed: list[str]):
    frozen = set(renamed)
    for index in layers:
        for path, module in model.get_submodule(f"{split.layers_name}.{index}").named_modules():
            own = any(True for _ in module.parameters(recurse=False))
            if own and "expert" in f"{path} {type(module).__name__}".lower() and not is_linear(module):
                frozen.add(path)
    if frozen:
        logger.warning_once(
            f"{type(model).__name__} is a mixture of experts: PEFT cannot train {', '.join(sorted(frozen))} on some "
            "layers alone, so they stay frozen, and the LoRAs go on the other linear layers."
        )


def _layer_and_name(name: str, layers_name: str) -> tuple[int, str]:
    """Position of its decoder layer and name within it."""
    index, _, inside = name.removeprefix(f"{layers_name}.").partition(".")
    return int(index), inside


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _shown(targets):
    return targets if targets is None or isinstance(targets, str) else sorted(targets)
