"""
Launched by test_two_processes.py in several processes: a run of a tiny model with a callback that watches it.

`--watch memory` prints the resident memory of the main process after every round, `--watch fail` lets the last process
fail in the second round, `--watch patience` ends the run after two rounds without a gain, of which none has one.
"""

import argparse
import os
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from fedbiot_trainer import FedBiOTConfig, FederatedRunner


class Watch(TrainerCallback):
    def __init__(self, what):
        self.what = what

    def on_step_end(self, args, state, control, **kwargs):
        if self.what == "memory" and args.process_index == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sys.stdout.write(f"\nresident {pages * os.sysconf('SC_PAGE_SIZE')}\n")
        if self.what == "fail" and state.global_step == 2 and args.process_index == args.world_size - 1:
            raise RuntimeError("the disk of this machine is gone")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--watch", choices=["memory", "fail", "patience"], required=True)
    parser.add_argument("--num_rounds", type=int, default=3)
    options = parser.parse_args()
    args = FedBiOTConfig(
        options.folder,
        num_rounds=options.num_rounds,
        local_steps=2,
        initial_alignment_steps=2,
        alignment_steps=2,
        alignment_batch_size=2,
        per_device_train_batch_size=2,
        teacher_cache_dir=f"{options.folder}/cache",
        report_to="none",
        use_cpu=True,
        **({"learning_rate": 0.0, "load_best_model_at_end": True} if options.watch == "patience" else {}),
    )
    texts = [f"{i}+{i}={2 * i}" for i in range(40)]
    runner = FederatedRunner(
        options.model,
        args,
        {"north": Dataset.from_dict({"text": texts[:10]}), "south": Dataset.from_dict({"text": texts[10:20]})},
        public_dataset=Dataset.from_dict({"text": texts[20:]}),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        eval_dataset=Dataset.from_dict({"text": texts[5:9]}) if options.watch == "patience" else None,
        callbacks=[Watch(options.watch), *([EarlyStoppingCallback(2)] if options.watch == "patience" else [])],
    )
    runner.train()


if __name__ == "__main__":
    main()
