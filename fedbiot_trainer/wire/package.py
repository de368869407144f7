"""What a client is given once: emulator + adapter layers as a plain Hugging Face model folder, and two PEFT folders."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..shared.lora_state import CLIENT, EMULATOR, LoraState, add_loras, load_lora, save_lora, set_lora_state
from ..shared.processes import is_main_process, is_sharded, whole_state_dict
from ..shared.quantized import keep_weight_layout, refuse_merging_quantized


MANIFEST = "fedbiot.json"
SCHEMA_VERSION = 1


def load_model(name: str | Path, **model_init_kwargs) -> PreTrainedModel:
    """
    `AutoModelForCausalLM.from_pretrained`, for training.

    Raises:
        ImportError: If the model is quantized with a library that is not installed.
        ValueError: If the folder holds a PEFT adapter and no model.
    """
    if (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"`model` is '{name}', which holds a PEFT adapter and no model. Pass its base model, or a folder with the "
            "adapter merged into it (`merge_and_unload()`)."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **model_init_kwargs)
    except ModuleNotFoundError as error:
        # transformers tells it of the other libraries.
        if (error.name or "").partition(".")[0] != "torchao":
            raise
        raise ImportError(
            f"'{name}' is quantized with torchao, which is not installed: `pip install torchao`"
        ) from error
    keep_weight_layout(model)
    return model


def check_package(folder: str | Path) -> Path:
    """The manifest of an emulator package. Raises `FileNotFoundError` if `folder` is none."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(
            f"'{folder}' is not an emulator package: it has no {MANIFEST}. The server writes one to "
            "`output_dir/emulator_package`."
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
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        manifest = {"schema_version": SCHEMA_VERSION, "num_adapter_layers": self.num_adapter_layers}
        manifest |= {"num_adapter_layers_bottom": self.num_adapter_layers_bottom}
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
            FileNotFoundError: If the folder is not an emulator package.
            ValueError: If a newer version of this library wrote it.
        """
        folder = Path(folder)
        manifest = json.loads(check_package(folder).read_text())
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"The emulator package '{folder}' has schema version {manifest['schema_version']}, this library reads "
                f"{SCHEMA_VERSION}. Install the version of fedbiot-trainer that the server uses."
            )
        model = load_model(folder, **model_init_kwargs)
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
