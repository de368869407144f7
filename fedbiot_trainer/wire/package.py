"""What a client is given once: emulator + adapter layers as a plain Hugging Face model folder, and two PEFT folders."""

import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..shared.lora_state import CLIENT, EMULATOR, LoraState, add_loras, load_lora, save_lora, set_lora_state
from ..shared.processes import is_main_process, is_sharded, whole_state_dict
from ..shared.quantized import keep_weight_layout, refuse_merging_quantized


MANIFEST = "fedbiot.json"
SCHEMA_VERSION = 1


def load_model(name: str | Path, is_whole: bool = False, **model_init_kwargs) -> PreTrainedModel:
    """
    `AutoModelForCausalLM.from_pretrained`, for training.

    Args:
        name (`str` or `Path`): The model.
        is_whole (`bool`, *optional*, defaults to `False`): Whether it must have all weights. Those that are missing are new
            otherwise, which is for transformers to tell.
        **model_init_kwargs: Passed on.

    Raises:
        ImportError: If the model is quantized with a library that is not installed.
        ValueError: If the folder holds a PEFT adapter and no model, or its weights are damaged or not all there.
    """
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"`model` is '{name}', which holds a PEFT adapter and no model. Pass its base model, or a folder with the "
            "adapter merged into it (`merge_and_unload()`)."
        )
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **model_init_kwargs)
    except SafetensorError as error:
        raise ValueError(f"The weights in '{name}' cannot be read ({error}). Copy them again.") from error
    except ModuleNotFoundError as error:
        # transformers tells it of the other libraries.
        if (error.name or "").partition(".")[0] != "torchao":
            raise
        raise ImportError(
            f"'{name}' is quantized with torchao, which is not installed: `pip install torchao`"
        ) from error
    missing = sorted(found["missing_keys"])
    if is_whole and missing:
        raise ValueError(
            f"'{name}' lacks weights: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Copy the folder again."
        )
    keep_weight_layout(model)
    return model


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    What an emulator package says of itself.

    Raises:
        FileNotFoundError: If `folder` is none.
        ValueError: If it is damaged, or another version of this library wrote it.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"'{folder}' is not an emulator package: it has no {MANIFEST}. The server writes one to "
            "`output_dir/emulator_package`."
        )
    try:
        manifest = json.loads(file.read_text())
        version, _ = manifest["schema_version"], manifest["num_adapter_layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{file}' is damaged ({error}). Copy the package again.") from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"The emulator package '{folder}' has schema version {version}, this library reads {SCHEMA_VERSION}. Install the "
            "version of fedbiot-trainer that the server uses."
        )
    return manifest


@dataclass
class EmulatorPackage:
    """
    Emulator + adapter layers with the state of both LoRAs.

    Attributes:
        model (`PreTrainedModel`): Emulator + adapter layers. No dropped layer is in it.
        num_adapter_layers (`int`): Layers nearest to the output that clients train.
        client_config, emulator_config ([`~peft.LoraConfig`]):
            Where the two LoRAs go. The second is `None` if all layers are adapter layers.
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): Their tensors.
        num_adapter_layers_bottom (`int`, *optional*, defaults to `0`): Layers nearest to the input that clients train.
    """

    model: PreTrainedModel
    num_adapter_layers: int
    client_config: LoraConfig
    emulator_config: LoraConfig | None
    client_lora: LoraState
    emulator_lora: LoraState
    num_adapter_layers_bottom: int = 0

    def save(self, folder: str | Path, processing_class: PreTrainedTokenizerBase | None = None) -> int:
        """
        Write the package as a folder that `AutoModelForCausalLM.from_pretrained` loads, with the PEFT folders
        `client_lora/` and `emulator_lora/` in it. All processes must call it; the main one writes.

        Returns:
            `int`: Bytes written.
        """
        folder = Path(folder)
        state = whole_state_dict(self.model)
        if not is_main_process():
            return 0
        # transformers cannot take back the conversions of quantized weights to another checkpoint format.
        quantized = getattr(self.model, "hf_quantizer", None) is not None
        self.model.save_pretrained(folder, state_dict=state, save_original_format=not quantized)
        for weights in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", weights)  # which safetensors lets nobody else read
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        manifest = {"schema_version": SCHEMA_VERSION, "num_adapter_layers": self.num_adapter_layers}
        manifest |= {
            "num_adapter_layers_bottom": self.num_adapter_layers_bottom,
            "emulator_lora": self.emulator_config is not None,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        self.save_loras(folder)
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def save_loras(self, folder: str | Path):
        """Write only the two PEFT folders, into a package that exists."""
        save_lora(Path(folder) / "client_lora", self.client_config, self.client_lora, base_model=None)
        if self.emulator_config is not None:
            save_lora(Path(folder) / "emulator_lora", self.emulator_config, self.emulator_lora, base_model=None)

    @classmethod
    def load(cls, folder: str | Path, **model_init_kwargs) -> "EmulatorPackage":
        """
        Read a folder that [`save`] wrote.

        Args:
            folder (`str` or `Path`): The folder.
            **model_init_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            FileNotFoundError: If the folder is not an emulator package, or lacks a part of one.
            ValueError: If it is damaged or lacks weights, or another version of this library wrote it.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest.get("emulator_lora") and not (folder / "emulator_lora").is_dir():
            raise FileNotFoundError(f"The emulator package '{folder}' has no emulator_lora/ any more. Copy it again.")
        model = load_model(folder, is_whole=True, **model_init_kwargs)
        client_config, client_lora = load_lora(folder / "client_lora")
        emulator_config: LoraConfig | None = None
        emulator_lora: LoraState = {}
        if (folder / "emulator_lora").is_dir():
            emulator_config, emulator_lora = load_lora(folder / "emulator_lora")
        return cls(
            model,
            manifest["num_adapter_layers"],
            client_config,
            emulator_config,
            client_lora,
            emulator_lora,
            manifest.get("num_adapter_layers_bottom", 0),
        )

    def peft_model(self) -> PeftModel:
        """
        The model with both LoRAs on it, loaded and active. `self.model` is changed in place, as PEFT does, so once.

        Raises:
            ValueError: If it was called before.
        """
        self._check_without_loras("another model of it")
        model = add_loras(self.model, self.client_config, self.emulator_config)
        set_lora_state(model, CLIENT, self.client_lora)
        set_lora_state(model, EMULATOR, self.emulator_lora)
        return model

    def merged(self) -> PreTrainedModel:
        """
        AdapEmu as a plain model: a copy of the model, of its dtype, with both LoRAs in its weights.

        Raises:
            ValueError: If the model is quantized or sharded, or [`peft_model`] was called before.
        """
        self._check_without_loras("what is merged")
        if any(map(is_sharded, self.model.parameters())):
            raise ValueError(
                "The package's model is sharded, so no process has whole weights to merge into. Save the package, and "
                "merge it from its folder in one process."
            )
        refuse_merging_quantized(self.model)
        package = replace(self, model=copy.deepcopy(self.model))
        return package.peft_model().merge_and_unload(safe_merge=True)

    def _check_without_loras(self, purpose: str):
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                "`peft_model()`, or a trainer, has put the LoRAs on this package's model already. Load the package anew for "
                f"{purpose}."
            )
