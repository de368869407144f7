"""
Federated fine-tuning without the full model (FedBiOT), from the command line.

Without arguments, the embedded demo (no network, a few minutes on a laptop):

    accelerate launch recipes/fedbiot_sft.py

With a recipe's YAML, any flag overriding it:

    accelerate launch recipes/fedbiot_sft.py --config recipes/gsm8k/llama2_7b.yaml --emulator_drop_ratio 0.2

With data of your own, one file per client:

    accelerate launch recipes/fedbiot_sft.py --model_name_or_path meta-llama/Llama-2-7b-hf \
        --client_datasets clinic-a=a.jsonl clinic-b=b.jsonl --public_dataset_name tatsu-lab/alpaca \
        --public_prompt_template "{instruction} {input}" --public_completion_template " {output}" --output_dir out

After `pip install`, `fedbiot train` does the same from any folder, the demo excepted.
"""

import sys
from pathlib import Path

from fedbiot_trainer.cli.main import main


RECIPES = Path(__file__).parent


def with_default_config(argv: list[str]) -> list[str]:
    """The demo's YAML stands in where neither a YAML nor a model is named."""
    if {"--config", "--model_name_or_path", "--help", "-h"} & {flag.partition("=")[0] for flag in argv}:
        return argv
    return ["--config", str(RECIPES / "demo" / "demo.yaml"), *argv]


if __name__ == "__main__":
    main(["train", *with_default_config(sys.argv[1:])])
