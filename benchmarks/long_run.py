"""
Whether a run stays as light as it began: resident memory, open files, disk and CPU time per round over many rounds at toy
size, with evaluation, states and records.

    python benchmarks/long_run.py --json long_run.json

A row compares blocks of a tenth of the rounds with the second block (in the first, caches fill): the median of the
blocks after it, the smallest and the largest. Disk is what the folder has at a block's end, without `rounds.jsonl`, whose
lines are counted apart.
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

from common import parser, random_llama, show, spread, token_dataset, word_tokenizer
from peft import LoraConfig
from transformers import TrainerCallback

from fedbiot_trainer import FedBiOTConfig, FederatedRunner


class Meter(TrainerCallback):
    """What the process holds after each round."""

    def __init__(self, folder: Path):
        self.folder, self.cpu = folder, time.process_time()
        self.rounds: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        cpu, self.cpu = self.cpu, time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        records = self.folder / "rounds.jsonl"
        self.rounds.append(
            {
                "resident MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                "open files": len(os.listdir("/proc/self/fd")),
                "disk MB": sum(file.stat().st_size for file in files if file != records) / 1e6,
                "bytes per record": records.stat().st_size / state.global_step,
                "CPU ms per round": 1000 * (self.cpu - cpu),
            }
        )


def measure(num_rounds: int) -> list[dict]:
    sizes = {"hidden_size": 32, "num_layers": 4, "vocab_size": 512}
    with tempfile.TemporaryDirectory() as folder:
        config = FedBiOTConfig(
            folder,
            num_rounds=num_rounds,
            local_steps=1,
            initial_alignment_steps=1,
            alignment_steps=1,
            alignment_batch_size=2,
            per_device_train_batch_size=2,
            teacher_cache_dir=f"{folder}/cache",
            report_to="none",
            use_cpu=True,
        )
        meter = Meter(Path(folder))
        runner = FederatedRunner(
            random_llama(*sizes.values()),
            config,
            {f"client-{i}": token_dataset(20, 16, sizes["vocab_size"], i) for i in range(2)},
            public_dataset=token_dataset(20, 16, sizes["vocab_size"]),
            eval_dataset=token_dataset(4, 16, sizes["vocab_size"], 9),
            processing_class=word_tokenizer(sizes["vocab_size"]),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
            callbacks=[meter],
        )
        runner.console.quiet = True
        runner.train()
    block, rows = num_rounds // 10, []
    for measure in meter.rounds[0]:
        values = [record[measure] for record in meter.rounds]
        blocks = [statistics.median(values[start : start + block]) for start in range(0, 10 * block, block)]
        ratios = [value / blocks[1] for value in blocks[2:]]
        rows.append(
            {"measure": measure, "rounds": num_rounds, "second_block": blocks[1], "last_block": blocks[-1]}
            | spread(ratios)
            | {"target": 1.1 if "CPU" in measure else 1.02}
        )
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--num_rounds", type=int, default=1000, help="At least 10.")
    args = arguments.parse_args()
    show("A long run", measure(20 if args.quick else args.num_rounds), args.json)


if __name__ == "__main__":
    main()
