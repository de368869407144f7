"""
What a run leaves as one plain model folder, for tools that take no LoRAs or only one.

    fedbiot merge out/emulator_package adap_emu
    fedbiot merge out/client_lora adap_fu
    fedbiot merge out_of_one_client adap_emu --package emulator_package
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.trainer_utils import align_special_tokens

from ..config.kinds import check_model_name
from ..config.settings import ALL_LAYERS
from ..server.split import LayerSplit, choose_split
from ..shared.lora_state import load_lora, set_lora_state
from ..shared.quantized import refuse_merging_quantized
from ..wire.package import MANIFEST, EmulatorPackage, load_model, read_manifest


def merge(
    folder: str | Path,
    output: str | Path,
    base_model: str | None = None,
    package: str | Path | None = None,
    **model_init_kwargs,
) -> PreTrainedModel:
    """
    Merge the LoRAs of an emulator package (AdapEmu), or a client LoRA into the full model (AdapFu), and write the
    result with its tokenizer.

    Args:
        folder (`str` or `Path`):
            `emulator_package/` or `client_lora/` of a run, or, with `package`, what a [`ClientSFTTrainer`] saved.
        output (`str` or `Path`): Folder to write, new or empty.
        base_model (`str`, *optional*): The full model, if it is not the one that `client_lora/` names.
        package (`str` or `Path`, *optional*):
            The emulator package that a client LoRA in `folder` was trained in. It becomes AdapEmu with that LoRA, or, if
            there is a `base_model`, says which of the full model's layers the LoRA is for.
        **model_init_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `trust_remote_code`, ...).

    Returns:
        `PreTrainedModel`: What was written.

    Raises:
        FileNotFoundError: If `folder` is neither of the two, or `package` is none.
        FileExistsError: If there is something in `output`.
        ValueError: If the weights are quantized, the full model is not known or not needed, or the LoRA is for other
            layers than the model's.
    """
    folder, output = Path(folder), Path(output)
    source: str | Path
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"`output` is '{output}', which is there and is not empty. Choose another folder.")
    if (folder / MANIFEST).is_file():
        for name, given in (("base_model", base_model), ("package", package)):
            if given is not None:
                raise ValueError(
                    f"`{name}` is '{given}', but '{folder}' is an emulator package, which has its own model. Leave it out."
                )
        model, source = EmulatorPackage.load(folder, **model_init_kwargs).merged(), folder
    elif package is not None and base_model is None:
        _check_lora_folder(folder)
        model, source = _with_client_lora(package, folder, **model_init_kwargs).merged(), Path(package)
    else:
        source = _base_model(folder, base_model, package)
        model = load_model(source, **model_init_kwargs)
        refuse_merging_quantized(model)
        model = _plug_in(model, folder, package).merge_and_unload(safe_merge=True)
        tokens = folder if package is None else Path(package)
        if (tokens / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(tokens)
        source = tokens if (tokens / "tokenizer_config.json").is_file() else source
    tokenizer = AutoTokenizer.from_pretrained(
        source, trust_remote_code=model_init_kwargs.get("trust_remote_code", False)
    )
    if isinstance(source, Path):
        align_special_tokens(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


def _with_client_lora(package: str | Path, folder: Path, **model_init_kwargs) -> EmulatorPackage:
    """A package with the client LoRA that was trained in it."""
    loaded = EmulatorPackage.load(package, **model_init_kwargs)
    config, state = load_lora(folder)
    if (
        config.layers_to_transform != loaded.client_config.layers_to_transform
        or state.keys() != loaded.client_lora.keys()
    ):
        raise ValueError(
            f"`folder` is '{folder}', a LoRA on the layers {config.layers_to_transform}, but in `package` '{package}' the "
            f"client LoRA is on {loaded.client_config.layers_to_transform}. Name the package that it was trained in."
        )
    return replace(loaded, client_config=config, client_lora=state)


def _plug_in(model: PreTrainedModel, folder: Path, package: str | Path | None) -> PeftModel:
    """The full model with a client LoRA on it, which is moved to the full model's layers if it is for a package."""
    number = model.config.get_text_config().num_hidden_layers
    config, state = load_lora(folder)
    if package is not None:
        split = _split_of(package, model)
        if config.layers_to_transform != list(split.adapter_positions):
            raise ValueError(
                f"`folder` is '{folder}', a LoRA on the layers {config.layers_to_transform}, but the adapter layers of "
                f"`package` '{package}' are {list(split.adapter_positions)}. Name the package that it was trained in."
            )
        state, config.layers_to_transform = split.to_full(state), list(split.adapter_indices)
    layers = config.layers_to_transform
    if layers and max(layers) != number - 1:
        raise ValueError(
            f"`folder` is '{folder}', a LoRA whose uppermost layer is {max(layers)}, but the uppermost layer of "
            f"{type(model).__name__} is {number - 1}, and the adapter layers are always at the top. If it was trained in an "
            "emulator package, name that as `package`; or name the full model that it is for as `base_model`."
        )
    plugged = get_peft_model(model, config)
    set_lora_state(plugged, "default", state)
    return plugged


def _split_of(package: str | Path, model: PreTrainedModel) -> LayerSplit:
    """The split of a full model that made a package, as far as its adapter layers go: which were dropped, it hides."""
    manifest = read_manifest(package)
    top, bottom = manifest["num_adapter_layers"], manifest.get("num_adapter_layers_bottom", 0)
    number = AutoConfig.from_pretrained(package).get_text_config().num_hidden_layers
    if number == top:
        return choose_split(model, ALL_LAYERS, 0.0)
    return replace(choose_split(model, top, 0.0, bottom), kept=tuple(range(bottom, number - top)))


def _check_lora_folder(folder: Path):
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"`folder` is '{folder}', which is neither an emulator package (it has no {MANIFEST}) nor a client LoRA (it "
            "has no adapter_config.json). A run writes both to its `output_dir`."
        )


def _base_model(folder: Path, given: str | None, package: str | Path | None) -> str:
    _check_lora_folder(folder)
    if package is None and (folder.parent / MANIFEST).is_file():
        raise ValueError(
            f"`folder` is '{folder}', a LoRA for the layers of the emulator package around it. Merge that package "
            f"('{folder.parent}'), or the client LoRA for the full model, which a run writes beside the package."
        )
    if given is not None and (Path(given) / MANIFEST).is_file():
        raise ValueError(
            f"`base_model` is '{given}', which is an emulator package, not a full model. Name it as `package`."
        )
    name = given or json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    if name is None:
        raise ValueError(f"`base_model` is None, and '{folder}' does not name the full model that it is for. Name it.")
    check_model_name(name, "base_model")
    return name


def main(argv: list[str] | None = None):
    """Merge what the command line or `argv` names."""
    parser = argparse.ArgumentParser("fedbiot merge", description="Merge LoRAs into one folder.")
    parser.add_argument("folder", help="emulator_package (gives AdapEmu) or client_lora (gives AdapFu) of a run.")
    parser.add_argument("output", help="Folder to write, new or empty.")
    parser.add_argument("--base_model", help="The full model, if it is not the one that client_lora names.")
    parser.add_argument("--package", help="The emulator package, for a LoRA that a client's own trainer saved.")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="Dtype of the sums. That of the weights (auto) rounds them; float32 keeps all of a small LoRA.",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Allow code from the Hub.")
    given = parser.parse_args(argv)
    try:
        model = merge(
            given.folder,
            given.output,
            given.base_model,
            given.package,
            dtype=given.dtype,
            trust_remote_code=given.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    dtype = str(model.dtype).removeprefix("torch.")
    Console(soft_wrap=True).print(f"{model.num_parameters():,} parameters in {dtype}, in {given.output}")
