"""
Launched by test_divergence.py in two processes: in the second local step of client "bad" the loss is not finite, in the
last process only.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig

from fedbiot_trainer import ClientSFTTrainer, FedBiOTConfig, FederatedRunner


def main(folder: str):
    args = FedBiOTConfig(
        f"{folder}/out", num_rounds=2, local_steps=3, initial_alignment_steps=2, alignment_steps=1, alignment_batch_size=2,
        per_device_train_batch_size=2, teacher_cache_dir=f"{folder}/cache", report_to="none", use_cpu=True,
    )  # fmt: skip
    texts = [f"{i}+{i}={2 * i}" for i in range(40)]
    bad, good, public = (Dataset.from_dict({"text": texts[i::3]}) for i in range(3))
    runner = FederatedRunner(
        f"{folder}/base", args, {"bad": bad, "good": good}, public_dataset=public,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    plain = ClientSFTTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = plain(self, model, inputs, return_outputs, num_items_in_batch)
        bad = self.train_dataset is runner.clients["bad"].train_dataset
        if bad and self.state.global_step == 1 and args.process_index == args.world_size - 1:
            self.record("sft_loss", torch.tensor(torch.nan))
        return loss

    ClientSFTTrainer.compute_loss = compute_loss
    runner.train()
    Path(folder, f"records-{args.process_index}.json").write_text(json.dumps([asdict(r) for r in runner.records]))


if __name__ == "__main__":
    main(sys.argv[1])
