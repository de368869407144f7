"""
What a client needs, and whether memory grows with the number of simulated clients.

Everything is run in a process of its own, and compared is the peak of its resident memory (`VmHWM`), or of a device's.

- `client step`: local steps on an emulator package, against full-model LoRA SFT (TRL's `SFTTrainer`, LoRA of the same
  rank on the same modules of all layers) with the same batches, with and without activation checkpointing. Both start
  from a model on disk; what the process holds before it loads a model is taken off.
- `alignment`: alignment steps from the store of hidden states with `offload_full_model`, against the same steps
  without. Compared is the peak of what is allocated on a simulated device (tests/simulated_device.py): a GPU has the
  same tensors, and its allocator's own needs in addition.
- `num_clients`: runs of a `FederatedRunner`, one series with the same number of training examples in all, the other
  with the same number for each client.
- Addresses: how many of the emulator's bytes are the full model's own.

    python benchmarks/memory.py --json memory.json
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common import parser, random_llama, show, spread, token_dataset, word_tokenizer


TARGET = 1.03
STEPS = ("client step", "full-model LoRA, checkpointed", "full-model LoRA")
ALIGNMENT = ("alignment, full model off", "full model on")
SIMULATED_DEVICE = Path(__file__).parents[1] / "tests" / "simulated_device.py"
SERIES = {"examples in all": (1200, None), "examples per client": (None, 4)}


def peak_mb() -> float:
    """Largest resident memory of this process so far. Unlike `ru_maxrss`, it does not start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def run_federation(args) -> dict:
    """One run, in this process."""
    from peft import LoraConfig

    from fedbiot_trainer import FedBiOTConfig, FederatedRunner

    model = random_llama(args.hidden_size, args.num_layers, args.vocab_size)
    examples = args.examples_per_client
    clients = {
        f"client-{i}": token_dataset(examples, args.num_tokens, args.vocab_size, i) for i in range(args.num_clients)
    }
    with tempfile.TemporaryDirectory() as folder:
        config = FedBiOTConfig(
            folder,
            num_rounds=2,
            local_steps=2,
            initial_alignment_steps=2,
            alignment_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            log_level="error",
        )
        runner = FederatedRunner(
            model,
            config,
            clients,
            public_dataset=token_dataset(64, args.num_tokens, args.vocab_size),
            processing_class=word_tokenizer(args.vocab_size),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        prepared = peak_mb()
        runner.train()
        return {"prepared_mb": prepared, "peak_mb": peak_mb(), "shared": shared_bytes(runner.server.models)}


def shared_bytes(models) -> float:
    """Share of the bytes of emulator + adapter layers, LoRAs apart, that lie in the full model's tensors."""

    def tensors(model):
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        return {tensor.data_ptr(): tensor.nbytes for name, tensor in named if "lora_" not in name}

    full, emulator = tensors(models.adap_fu), tensors(models.adap_emu)
    return sum(size for address, size in emulator.items() if address in full) / sum(emulator.values())


def save_models(args, folder: str):
    """The full model and its emulator package."""
    from peft import LoraConfig

    from fedbiot_trainer import FedBiOTConfig, FederatedServer

    sizes = args.step_hidden_size, args.step_num_layers, args.vocab_size
    model, tokenizer = random_llama(*sizes), word_tokenizer(args.vocab_size)
    model.save_pretrained(f"{folder}/full")
    config = FedBiOTConfig(folder, initial_alignment_steps=0, alignment_steps=0, emulator_drop_ratio=0.5)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    FederatedServer(model, config, None, tokenizer, lora).package().save(f"{folder}/package")


def train_steps(args) -> dict:
    """Three steps of a client or of full-model LoRA SFT, in this process."""
    from peft import LoraConfig
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from fedbiot_trainer import ClientSFTTrainer, FedBiOTConfig

    data, tokenizer = token_dataset(24, 128, args.vocab_size), word_tokenizer(args.vocab_size)
    shared = {"per_device_train_batch_size": 8, "bf16": False, "report_to": "none", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        before = peak_mb()
        if args.step == "client step":
            config = FedBiOTConfig(folder, local_steps=3, **shared)
            trainer = ClientSFTTrainer(f"{args.models}/package", config, data, processing_class=tokenizer)
        else:
            config = SFTConfig(folder, max_steps=3, activation_checkpointing="checkpointed" in args.step, **shared)
            model = LlamaForCausalLM.from_pretrained(f"{args.models}/full")
            lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
        weights = sum(parameter.nbytes for parameter in trainer.model.parameters()) / 1e6
        trainer.train()
        return {"weights_mb": weights, "peak_mb": peak_mb() - before}


def align_steps(args) -> dict:
    """Three alignment steps from the store of hidden states, in this process on the simulated device."""
    import torch
    from peft import LoraConfig

    from fedbiot_trainer import EmulatorAlignmentTrainer, FedBiOTConfig

    data, tokenizer = token_dataset(24, 128, args.vocab_size), word_tokenizer(args.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        config = FedBiOTConfig(
            folder,
            initial_alignment_steps=3,
            alignment_steps=0,
            alignment_batch_size=8,
            emulator_drop_ratio=0.5,
            offload_full_model=args.step == ALIGNMENT[0],
            teacher_cache_dir=folder,
            bf16=False,
            report_to="none",
            save_strategy="no",
        )
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        trainer = EmulatorAlignmentTrainer(
            f"{args.models}/full", config, data, processing_class=tokenizer, peft_config=lora
        )
        trainer.prepare_teacher()
        weights = torch.hpu.memory_allocated() / 1e6
        torch.hpu.reset_peak_memory_stats()
        trainer.train()
        return {"weights_mb": weights, "peak_mb": torch.hpu.max_memory_allocated() / 1e6}


def in_subprocess(args, num_clients: int, examples_per_client: int) -> dict:
    sizes = ("hidden_size", "num_layers", "vocab_size", "num_tokens")
    flags = [f"--{name}={getattr(args, name)}" for name in sizes]
    return launch(*flags, f"--num_clients={num_clients}", f"--examples_per_client={examples_per_client}")


def launch(*flags: str) -> dict:
    on_device = [str(SIMULATED_DEVICE)] if any(f"--step={step}" in flags for step in ALIGNMENT) else []
    command = [sys.executable, *on_device, __file__, *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_steps(args) -> list[dict]:
    """Each kind of step against the first of its group."""
    groups = (STEPS[:2] if args.quick else STEPS), ALIGNMENT
    with tempfile.TemporaryDirectory() as folder:
        save_models(args, folder)
        sizes = ("vocab_size", "step_hidden_size", "step_num_layers")
        flags = [f"--models={folder}", *(f"--{name}={getattr(args, name)}" for name in sizes)]
        # The first may build the device, for which the last would wait.
        names = [ALIGNMENT[0], *groups[0], ALIGNMENT[1]] * args.repetitions
        with ThreadPoolExecutor(2) as pool:  # memory does not depend on what runs beside it
            runs = list(pool.map(lambda step: launch(*flags, f"--step={step}"), names))
        results = {step: [run for name, run in zip(names, runs, strict=True) if name == step] for step in names}
    rows = []
    for first, step in [(steps[0], step) for steps in groups for step in steps[1:]]:
        peaks = [[result["peak_mb"] for result in results[name]] for name in (first, step)]
        rows.append(
            {
                "constant": f"{first} / {step}",
                "hidden_size": args.step_hidden_size,
                "num_layers": args.step_num_layers,
                "first_weights_mb": results[first][0]["weights_mb"],
                "weights_mb": results[step][0]["weights_mb"],
                "first_peak_mb": statistics.median(peaks[0]),
                "peak_mb": statistics.median(peaks[1]),
                **spread(one / other for one, other in zip(*peaks, strict=True)),
                "target": 1.0,
            }
        )
    return rows


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=64)
    arguments.add_argument("--num_layers", type=int, default=6)
    arguments.add_argument("--vocab_size", type=int, default=512)
    arguments.add_argument("--num_tokens", type=int, default=64, help="Tokens per example.")
    arguments.add_argument("--clients", type=int, nargs="+", default=[3, 30, 100, 300], help="The first is the base.")
    arguments.add_argument("--repetitions", type=int, default=2, help="Processes per configuration.")
    arguments.add_argument("--num_clients", type=int, help="Only this run, in this process; prints one line of JSON.")
    arguments.add_argument("--examples_per_client", type=int, default=4)
    arguments.add_argument("--step_hidden_size", type=int, default=512, help="Hidden size for the client step.")
    arguments.add_argument("--step_num_layers", type=int, default=16, help="Layers of the full model for it.")
    arguments.add_argument(
        "--step", choices=STEPS + ALIGNMENT, help="Only these steps, in this process; prints a line of JSON."
    )
    arguments.add_argument("--models", help="Folder of the models for them.")
    args = arguments.parse_args()
    if args.step:
        print("\n" + json.dumps((align_steps if args.step in ALIGNMENT else train_steps)(args)))
        return
    if args.num_clients:
        print("\n" + json.dumps(run_federation(args)))
        return
    if args.quick:
        args.clients, args.repetitions, args.step_hidden_size = [3, 12], 1, 64

    rows = measure_steps(args)
    for series, (total, per_client) in list(SERIES.items())[: 1 if args.quick else None]:
        sizes = {clients: per_client or total // clients for clients in args.clients}
        with ThreadPoolExecutor(2) as pool:
            repeated = [pool.map(partial(in_subprocess, args), sizes, sizes.values()) for _ in range(args.repetitions)]
            results = dict(zip(sizes, zip(*repeated, strict=True), strict=True))
        peaks = {clients: statistics.median(r["peak_mb"] for r in runs) for clients, runs in results.items()}
        base = peaks[args.clients[0]]
        rows += [
            {
                "constant": series,
                "num_clients": clients,
                "examples_per_client": sizes[clients],
                "prepared_mb": statistics.median(result["prepared_mb"] for result in runs),
                "peak_mb": peaks[clients],
                **spread(result["peak_mb"] / base for result in runs),
                "target": TARGET,
            }
            for clients, runs in results.items()
        ]
    shared = spread(result["shared"] for result in results[args.clients[0]])
    rows.append({"constant": "emulator bytes shared with the full model", **shared, "target": 1.0})
    show("Peak memory", rows, args.json)


if __name__ == "__main__":
    main()
