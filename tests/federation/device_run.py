"""Runs of a tiny model on whatever device there is, for test_device.py. Prints their results as JSON."""

import json
import sys

from conftest import sums
from peft import LoraConfig

from fedbiot_trainer import ClientSFTTrainer, EmulatorAlignmentTrainer, FedBiOTConfig, FederatedRunner


CHECKPOINTING = (
    "activation_checkpointing" if hasattr(FedBiOTConfig, "activation_checkpointing") else "gradient_checkpointing"
)
RUNS = {
    "cached": {},
    "offloaded": {"offload_full_model": True, "packing": True, "max_length": 32, "plug_in_steps": 3},
    "online": {"num_adapter_layers": 1, "num_adapter_layers_bottom": 1, CHECKPOINTING: True},
    "autocast": {"bf16": True, "plug_in_steps": 3},
    "not aligned": {"initial_alignment_steps": 0, "alignment_steps": 0},
    "computed start": {"alignment_init": "closed_form", "alignment_kl_weight": 0.0},
}


def make_args(folder: str, **settings) -> FedBiOTConfig:
    shared = {
        "num_rounds": 2, "local_steps": 3, "initial_alignment_steps": 3, "alignment_steps": 2, "learning_rate": 1e-2,
        "alignment_learning_rate": 1e-2, "per_device_train_batch_size": 4, "alignment_batch_size": 4, "bf16": False,
        "eval_metric": "exact_match", "eval_max_new_tokens": 3, "report_to": "none", "disable_tqdm": True,
        "log_level": "error", "teacher_cache_dir": f"{folder}/cache",
    }  # fmt: skip
    return FedBiOTConfig(folder, **{**shared, **settings})


def federation(base: str, folder: str, **settings) -> dict[str, float]:
    """Losses of a run."""
    runner = FederatedRunner(
        base,
        make_args(folder, **settings, eval_drift=True),
        {"north": sums(0, 8), "south": sums(8, 12)},
        public_dataset=sums(40, 50),
        eval_dataset=sums(50, 55),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    summary = runner.train()
    losses = {name: getattr(summary, name)["loss"] for name in ("zero_shot", "adap_emu", "adap_fu")}
    learning = summary.plug_in_learning
    if learning is not None:
        losses |= {"learning": learning.last_kl, "learned": learning.after}
    return losses | {"drift": runner.drift.measure()["drift_kl"]}


def parties(base: str, folder: str, **settings) -> dict[str, float]:
    """Losses of an owner and a client, each with a trainer alone, and of both after a checkpoint."""
    lora, losses = LoraConfig(r=4, target_modules="all-linear"), {}
    checkpoints = {"save_strategy": "steps", "save_steps": 2}
    for resume in (False, True):  # after the second of three steps
        args = make_args(f"{folder}/owner", **settings, **checkpoints)
        owner = EmulatorAlignmentTrainer(base, args, sums(40, 50), peft_config=lora)
        result = owner.train(resume_from_checkpoint=f"{folder}/owner/checkpoint-2" if resume else None)
        losses[f"owner, {resume}"] = result.training_loss
        owner.save_model(f"{folder}/package")
        args = make_args(f"{folder}/client", **settings, **checkpoints)
        client = ClientSFTTrainer(f"{folder}/package", args, sums(0, 8))
        result = client.train(resume_from_checkpoint=f"{folder}/client/checkpoint-2" if resume else None)
        losses[f"client, {resume}"] = result.training_loss
    return losses


def results(base: str, folder: str, **settings) -> dict[str, dict[str, float]]:
    found = {name: federation(base, f"{folder}/{name}", **settings, **run) for name, run in RUNS.items()}
    return found | {"parties": parties(base, folder, **settings)}


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(results(*sys.argv[1:])) + "\n")
