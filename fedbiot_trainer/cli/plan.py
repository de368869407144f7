"""
What a run will cost, from the model's config alone.

    fedbiot plan --model meta-llama/Llama-2-7b-hf --emulator_drop_ratio 0.5
"""

import argparse
import json
import sys
from pathlib import Path

from peft import LoraConfig
from rich.console import Console
from rich.table import Column, Table

from ..config import FedBiOTConfig
from ..config.kinds import check_model_name
from ..federation.costs import COLUMNS, SETTINGS, plan
from ..output.tables import format_bytes


def plan_tables(plan: dict[str, dict]) -> list[Table]:
    """What [`plan`] returned, as two tables: one client, and the server."""
    model, settings = plan["model"], plan["settings"]
    adapter_layers = model["num_adapter_layers"] + model["num_adapter_layers_bottom"]
    layers = f"{len(model['kept'])} + {adapter_layers} of {model['num_layers']} layers"
    titles = {
        "clients": f"One client: {layers} of {model['architecture']} in {model['dtype']}, "
        "{local_steps} x {per_device_train_batch_size} x {max_length:,} tokens a round",
        "server": "Server of {num_clients} clients: {initial_alignment_steps} alignment steps, then {alignment_steps} "
        "a round, x {alignment_batch_size} x {max_length:,} tokens",
    }
    tables = []
    for part, title in titles.items():
        if not plan[part]:  # all layers are adapter layers: nothing to align
            continue
        columns = [Column(COLUMNS[name], justify="right") for name in plan[part]]
        tables.append(Table("", *columns, title=title.format(**settings), title_justify="left", show_edge=False))
        for key in next(iter(plan[part].values())):
            label = key.replace("_", " ").replace("flops", "FLOPs")
            tables[-1].add_row(label, *(_format(key, costs[key]) for costs in plan[part].values()))
    return tables


def _format(key: str, value: int) -> str:
    if "flops" in key:
        exponent = min((len(str(value)) - 1) // 3, 5)
        return f"{value / 1000**exponent:,.1f} {('', 'k', 'M', 'G', 'T', 'P')[exponent]}FLOPs"
    return format_bytes(value) if "bytes" in key or "memory" in key else f"{value:,}"


def main(argv: list[str] | None = None):
    """Print the plan of a model, with the arguments of the command line or `argv`."""
    parser = argparse.ArgumentParser("fedbiot plan", description="What a FedBiOT run will cost.")
    parser.add_argument("--model", required=True, help="Full model: a name on the Hub, a folder or a config.json.")
    parser.add_argument("--revision", default="main", help="Its branch, tag or commit on the Hub.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Allow code from the Hub.")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="Its dtype.")
    parser.add_argument("--lora_r", type=int, default=8, help="Rank of the client LoRA.")
    parser.add_argument("--lora_target_modules", nargs="+", help="Its target modules, or all-linear.")
    parser.add_argument("--public_examples", type=int, default=52_000, help="Size of the public dataset.")
    parser.add_argument("--json", type=Path, help="File to write the numbers to.")
    for name in SETTINGS:
        field = FedBiOTConfig.__dataclass_fields__[name]
        default = 1 if name == "per_device_train_batch_size" else field.default
        parser.add_argument(f"--{name}", type=type(default or 0), default=default, help=field.metadata["help"])
    given = parser.parse_args(argv)
    targets = "all-linear" if given.lora_target_modules == ["all-linear"] else given.lora_target_modules
    try:
        if not Path(given.model).is_file():
            check_model_name(given.model, "model")
        args = FedBiOTConfig(**{name: getattr(given, name) for name in (*SETTINGS, "trust_remote_code")}, use_cpu=True)
        args.model_init_kwargs = {"dtype": given.dtype, "revision": given.revision}
        peft_config = LoraConfig(r=given.lora_r, target_modules=targets)
        costs = plan(given.model, args, peft_config, public_examples=given.public_examples)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    for table in plan_tables(costs):
        Console().print(table, "")
    if given.json is not None:
        given.json.write_text(json.dumps(costs, indent=2) + "\n")
