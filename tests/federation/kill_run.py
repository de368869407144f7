"""
Launched by test_resume.py: a run in processes of its own that are killed (SIGKILL) again and again and resumed, and the
same run left alone. Prints as JSON what was killed when, and whether both ended with the same bits.

The libraries are imported once, and each attempt is forked, so that it takes a second and not ten.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

from conftest import sums, tiny_model
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedbiot_trainer import FedBiOTConfig, FederatedRunner
from fedbiot_trainer.federation.loop import RoundLoop


ONCE = ["hidden states", "initial alignment"]
EACH_ROUND = ["alignment", "local training", "saving", "evaluating"]


def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def announce(phases: Path):
    """Have the run say in a file where it is, and take its time while it saves."""
    tell, rename = RoundLoop._tell, Path.rename

    def announced(self, event, *values):
        if event == "on_phase":
            phases.write_text(values[1])
        tell(self, event, *values)

    def slow_rename(self, target):
        if self.suffix == ".part" and self.parent.name == "state":
            before = phases.read_text()
            phases.write_text("saving")
            time.sleep(0.03)
            rename(self, target)
            time.sleep(0.03)
            phases.write_text(before)
        else:
            rename(self, target)

    RoundLoop._tell, Path.rename = announced, slow_rename


def run(folder: Path, phases: Path, cache: Path, num_rounds: int, save_after_clients: bool):
    announce(phases)
    args = FedBiOTConfig(
        str(folder), num_rounds=num_rounds, local_steps=4, initial_alignment_steps=20, alignment_steps=4, alignment_batch_size=2,
        per_device_train_batch_size=2, learning_rate=1e-2, alignment_learning_rate=1e-2, lr_scheduler_type="linear",
        teacher_cache_dir=str(cache), report_to="none", use_cpu=True, disable_tqdm=True, fraction_train=0.67,
        save_after_clients=save_after_clients, resume_from_checkpoint=True,
    )  # fmt: skip
    FederatedRunner(
        tiny_model(), args, {"north": sums(0, 8), "south": sums(8, 12), "west": sums(12, 18)},
        public_dataset=sums(20, 40), eval_dataset=sums(50, 55), processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear"),
    ).train()  # fmt: skip


def start(number: int, *arguments) -> list[int]:
    """Fork the run's processes. Returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(number):
        process = os.fork()
        if process == 0:
            if number > 1:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(number),
                }  # fmt: skip
            code = 1
            try:
                run(*arguments)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        processes.append(process)
    return processes


def kill_in(phase: str, phases: Path, processes: list[int], delay: float) -> bool:
    """Kill one process with SIGKILL in a phase, and then the others. `False`: the run ended before."""
    while not (phases.exists() and phases.read_text().startswith(phase)):
        if os.waitpid(processes[0], os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.001)
    time.sleep(delay)
    for process in reversed(processes):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return True


def content(folder: Path) -> dict:
    loras = ("client_lora", "emulator_package/client_lora", "emulator_package/emulator_lora")
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "loras": [(folder / name / "adapter_model.safetensors").read_bytes() for name in loras],
        "records": [{name: value for name, value in record.items() if name != "seconds"} for record in records],
        "scores": [summary[name] for name in ("zero_shot", "adap_emu", "adap_fu", "rounds", "bytes")],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--num_rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_after_clients", action="store_true")
    options = parser.parse_args()
    generator, phases, killed = random.Random(options.seed), options.folder / "phase", []
    whole, cut = (
        (
            options.folder / name,
            phases,
            options.folder / f"{name}-cache",
            options.num_rounds,
            options.save_after_clients,
        )
        for name in ("whole", "cut")
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    for process in start(options.processes, *whole):
        assert os.waitpid(process, 0)[1] == 0
    for number in range(options.kills):
        phases.unlink()
        phase, delay = (ONCE + EACH_ROUND * options.kills)[number], generator.uniform(0, 0.05)
        if not kill_in(phase, phases, start(options.processes, *cut), delay):
            break
        states = sorted(file.name for file in (cut[0] / "state").glob("*"))
        killed.append({"phase": phase, "states": states})
    else:
        for process in start(options.processes, *cut):
            assert os.waitpid(process, 0)[1] == 0
    one, other = content(whole[0]), content(cut[0])
    result = {"killed": killed, **{name: one[name] == other[name] for name in one}}
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
