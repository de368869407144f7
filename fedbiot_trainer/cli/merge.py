"""
What a run leaves as one plain model folder, for tools that take no LoRAs or only one.

    fedbiot merge out/emulator_package adap_emu
    fedbiot merge out/client_lora adap_fu
"""

import argparse
import json
import sys
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.trainer_utils import align_special_tokens

from ..shared.quantized import refuse_merging_quantized
from ..wire.package import MANIFEST, EmulatorPackage, load_model


def merge(
    folder: str | Path, output: str | Path, base_model: str | None = None, **model_init_kwargs
) -> PreTrainedModel:
    """
    Merge the LoRAs of an emulator package (AdapEmu), or a client LoRA into the full model (AdapFu), and write the
    result with its tokenizer.

    Args:
        folder (`str` or `Path`): `emulator_package/` or `client_lora/` of a run.
        output (`str` or `Path`): Folder to write, new or empty.
        base_model (`str`, *optional*): The full model, if it is not the one that `client_lora/` names.
        **model_init_kwargs: Passed to `AutoModelForCausalLM.from_pretrained` (`dtype`, `trust_remote_code`, ...).

    Returns:
        `PreTrainedModel`: What was written.

    Raises:
        FileNotFoundError: If `folder` is neither of the two.
        FileExistsError: If there is something in `output`.
        ValueError: If the weights are quantized, or the full model is not known or not needed.
    """
    folder, output = Path(folder), Path(output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"`output` is '{output}', which is there and is not empty. Choose another folder.")
    if (folder / MANIFEST).is_file():
        if base_model is not None:
            raise ValueError(
                f"`base_model` is '{base_model}', but '{folder}' is an emulator package, which has its own model. Leave "
                "it out."
            )
        model, source = EmulatorPackage.load(folder, **model_init_kwargs).merged(), folder
    else:
        source = _base_model(folder, base_model)
        model = load_model(source, **model_init_kwargs)
        refuse_merging_quantized(model)
        model = PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        source = folder if (folder / "tokenizer_config.json").is_file() else source
    tokenizer = AutoTokenizer.from_pretrained(
        source, trust_remote_code=model_init_kwargs.get("trust_remote_code", False)
    )
    if source == folder:
        align_special_tokens(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return model


def _base_model(folder: Path, given: str | None) -> str:
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"`folder` is '{folder}', which is neither an emulator package (it has no {MANIFEST}) nor a client LoRA (it "
            "has no adapter_config.json). A run writes both to its `output_dir`."
        )
    if (folder.parent / MANIFEST).is_file():
        raise ValueError(
            f"`folder` is '{folder}', a LoRA for the layers of the emulator package around it. Merge that package "
            f"('{folder.parent}'), or the client LoRA for the full model, which a run writes beside the package."
        )
    name = given or json.loads(config.read_text())["base_model_name_or_path"]
    if name is None:
        raise ValueError(f"`base_model` is None, and '{folder}' does not name the full model that it is for. Name it.")
    return name


def main(argv: list[str] | None = None):
    """Merge what the command line or `argv` names."""
    parser = argparse.ArgumentParser("fedbiot merge", description="Merge LoRAs into one folder.")
    parser.add_argument("folder", help="emulator_package (gives AdapEmu) or client_lora (gives AdapFu) of a run.")
    parser.add_argument("output", help="Folder to write, new or empty.")
    parser.add_argument("--base_model", help="The full model, if it is not the one that client_lora names.")
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
            dtype=given.dtype,
            trust_remote_code=given.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    dtype = str(model.dtype).removeprefix("torch.")
    Console(soft_wrap=True).print(f"{model.num_parameters():,} parameters in {dtype}, in {given.output}")
