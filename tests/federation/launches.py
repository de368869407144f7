"""Runs of a tiny model in one process and in two, for the tests that compare or watch them."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import save_files, sums, tiny_model

from fedbiot_trainer.cli import train as cli


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"
# The same examples in each step as one process with twice the batch sizes.
TWO, ONE = (2, 3), (4, 6)


def save_run_files(folder, tokenizer):
    """A base in float32 and, as `exact`, in float64, with the text of a run. Gives the folder."""
    tiny_model().double().save_pretrained(folder / "exact")
    tokenizer.save_pretrained(folder / "exact")
    return save_files(folder, tokenizer, a=sums(0, 8), b=sums(8, 12), public=sums(20, 30), test=sums(30, 33))


def launch(*command, config=None):
    """Launch a script, in two processes if there is a configuration."""
    if config == "fsdp2":
        command, config = (Path(__file__).parent / "fsdp_run.py", CONFIGS / "fsdp2.yaml", *command), "ddp"
    elif config is not None and config.startswith("zero"):
        command = (Path(__file__).parent / "deepspeed_run.py", *command)
    launcher = [sys.executable]
    if config is not None:
        launcher += ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
        launcher += ["--config_file", str(CONFIGS / "cpu" / f"{config}.yaml")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


def flags_of(files, folder, batch_sizes, base="base", **settings):
    settings = {
        "num_rounds": 3, "local_steps": 3, "initial_alignment_steps": 4, "alignment_steps": 2, "lora_dropout": 0.0,
        "per_device_train_batch_size": batch_sizes[0], "alignment_batch_size": batch_sizes[1], "learning_rate": 2e-3,
        # An epsilon that keeps AdamW from blowing up the rounding of gradients near zero.
        "alignment_learning_rate": 2e-3, "adam_epsilon": 1e-3, "proximal_weight": 0.5, "report_to": "none", "use_cpu": "true", "dtype": "auto",
        "eval_metric": "exact_match", "eval_max_new_tokens": 3, "teacher_cache_dir": folder / "cache", **settings,
    }  # fmt: skip
    flags = [
        "--model_name_or_path", files / base, "--output_dir", folder / "out",
        "--client_datasets", f"north={files / 'a.jsonl'}", f"south={files / 'b.jsonl'}",
        "--public_dataset_name", files / "public.jsonl", "--eval_dataset_name", files / "test.jsonl",
    ]  # fmt: skip
    for name, value in settings.items():
        flags += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return [*map(str, flags)]


def run_two(files, folder, config, **settings):
    """The run in two processes. Gives its folder."""
    result = launch(ROOT / "recipes" / "fedbiot_sft.py", *flags_of(files, folder, TWO, **settings), config=config)
    assert result.returncode == 0, result.stderr[-5000:]
    return folder / "out"


def run_one(files, folder, base="base", **settings):
    """The run in this process alone, of float32 weights or of float64 ones (`"exact"`). Gives its folder."""
    cli.train(*cli.make_parser().parse_args_and_config(flags_of(files, folder / base, ONE, base, **settings)))
    return folder / base / "out"
