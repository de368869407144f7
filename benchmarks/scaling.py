"""
What several processes cost and save: one run with one process, and with two under DDP, ZeRO-2 and ZeRO-3.

All runs do the same work: with two processes, each takes half of every batch. They are launched with the configurations
in `accelerate_configs/cpu/`, in turn. Compared with the run of one process are the bytes of frozen weights that each
process holds, and the wall time of a round, its first left out. Two processes share this machine's cores, memory and
caches, so that the time says what the coordination costs rather than what two GPUs would give.

    python benchmarks/scaling.py --json scaling.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import parser, random_llama, show, spread, token_dataset, word_tokenizer


CONFIGS = Path(__file__).parents[1] / "accelerate_configs" / "cpu"
TARGETS = {"ddp": 1.0, "zero2": 1.0, "zero3": 0.55}  # weights in each process
SIZES = ("hidden_size", "num_layers", "vocab_size", "num_tokens", "batch_size", "num_rounds")


def run_federation(args):
    """One run, in the process that the launcher made."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from fedbiot_trainer import FedBiOTConfig, FederatedRunner

    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    config = FedBiOTConfig(
        args.folder,
        num_rounds=args.num_rounds,
        local_steps=10,
        initial_alignment_steps=2,
        alignment_steps=4,
        alignment_batch_size=args.batch_size // num_processes,
        per_device_train_batch_size=args.batch_size // num_processes,
        teacher_cache_dir=f"{args.folder}/cache",
        report_to="none",
        log_level="error",
        use_cpu=True,
        bf16=False,
    )
    runner = FederatedRunner(
        AutoModelForCausalLM.from_pretrained(args.model),
        config,
        {f"client-{i}": token_dataset(64, args.num_tokens, args.vocab_size, i) for i in range(2)},
        public_dataset=token_dataset(64, args.num_tokens, args.vocab_size),
        processing_class=word_tokenizer(args.vocab_size),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    runner.train()
    if config.process_index == 0:
        held = {}
        for name, parameter in runner.server.models.adap_fu.named_parameters():
            tensor = getattr(parameter, "ds_tensor", parameter)
            if "lora_" not in name:
                held[tensor.data_ptr()] = tensor.nbytes
        Path(args.folder, "weights.json").write_text(json.dumps(sum(held.values())))


def launch(args, model: str, config: str | None) -> tuple[int, list[float]]:
    """Bytes of weights in a process, and the seconds of each round."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable]
        if config is not None:
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
            launcher += ["--main_process_port", "0"]
        command = [*launcher, __file__, f"--folder={folder}/run", f"--model={model}"]
        command += [f"--{name}={getattr(args, name)}" for name in SIZES]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of ninja
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        records = [json.loads(line) for line in Path(folder, "run", "rounds.jsonl").open()]
        weights = json.loads(Path(folder, "run", "weights.json").read_text())
        return weights, [sum(record["seconds"].values()) for record in records[1:]]


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=512)
    arguments.add_argument("--num_layers", type=int, default=8, help="Decoder layers of the full model.")
    arguments.add_argument("--vocab_size", type=int, default=512)
    arguments.add_argument("--num_tokens", type=int, default=128, help="Tokens per example.")
    arguments.add_argument("--batch_size", type=int, default=4, help="Examples per step in all processes.")
    arguments.add_argument("--num_rounds", type=int, default=4)
    arguments.add_argument("--folder", help="Only this run, in this process.")
    arguments.add_argument("--model", help="Its full model.")
    args = arguments.parse_args()
    if args.folder:
        run_federation(args)
        return
    configs = list(TARGETS)
    if args.quick:
        args.hidden_size, args.num_rounds, configs = 64, 2, ["ddp"]
    with tempfile.TemporaryDirectory() as model:
        random_llama(args.hidden_size, args.num_layers, args.vocab_size).save_pretrained(model)
        one_weights, one_seconds = launch(args, model, None)
        one_round = statistics.median(one_seconds)
        rows = []
        for config in configs:
            weights, seconds = launch(args, model, config)
            sizes = {name: getattr(args, name) for name in SIZES}
            rows += [
                {
                    "configuration": config,
                    "num_processes": 2,
                    "measure": "weights in a process",
                    **sizes,
                    "one": one_weights / 1e6,
                    "value": weights / 1e6,
                    **spread([weights / one_weights]),
                    "target": TARGETS[config],
                },
                {
                    "configuration": config,
                    "num_processes": 2,
                    "measure": "seconds of a round",
                    **sizes,
                    "one": one_round,
                    "value": statistics.median(seconds),
                    **spread(second / one_round for second in seconds),
                    "target": None,
                },
            ]
    show("Two processes against one", rows, args.json)


if __name__ == "__main__":
    main()
