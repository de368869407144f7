import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import save_files, sums

from fedbiot_trainer import DivergenceError
from fedbiot_trainer.shared.round_trainer import RoundTrainer


def break_loss(monkeypatch, trainer, step):
    """From `step` on, the loss is not finite."""
    calls, plain = [], trainer.compute_loss

    def broken(model, inputs, **kwargs):
        loss = plain(model, inputs, **kwargs)
        calls.append(1)
        if len(calls) >= step:
            name = "sft_loss" if trainer.lora_name == "client" else "alignment_l2"
            trainer.record(name, torch.tensor(math.nan))
            loss = loss * math.nan
        return loss

    monkeypatch.setattr(trainer, "compute_loss", broken)


def test_alignment_that_diverges_ends_the_run(make_runner, monkeypatch):
    run = make_runner(initial_alignment_steps=5)
    before = {key: tensor.clone() for key, tensor in run.server.emulator_lora.items()}
    break_loss(monkeypatch, run.server.trainer, 3)
    with pytest.raises(
        DivergenceError, match=r"The loss of the emulator LoRA is not finite in step 3 of 9, at `alignment_l"
    ) as error:
        run.train()
    assert "Lower `alignment_learning_rate` (to 0.001, for example)" in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in run.server.emulator_lora.items())


def test_client_that_diverges_is_left_out(make_runner, monkeypatch):
    run = make_runner(num_rounds=1, client_datasets={"bad": sums(0, 8), "good": sums(8, 12)})
    plain = RoundTrainer.training_step

    def broken(self, model, inputs, num_items_in_batch=None):
        if (
            self is run.trainer
            and self.train_dataset is run.clients["bad"].train_dataset
            and self.state.global_step == 1
        ):
            self.compute_loss = lambda *args, **kwargs: (
                self.record("sft_loss", torch.tensor(math.inf))
                or next(p for p in self.model.parameters() if p.requires_grad).sum() * math.nan
            )
        try:
            return plain(self, model, inputs, num_items_in_batch)
        finally:
            vars(self).pop("compute_loss", None)

    monkeypatch.setattr(RoundTrainer, "training_step", broken)
    run.train()
    [record] = run.records
    assert record.weights == {"good": 1.0}
    assert (
        "DivergenceError: The loss of the client LoRA is not finite in step 2 of 3, at `learning_rate` 0.01"
        in record.failed["bad"]
    )
    assert all(torch.isfinite(tensor).all() for tensor in run.server.client_lora.values())


def test_lora_that_overflows_in_the_last_step_is_not_sent(make_runner):
    """No loss sees it."""
    run = make_runner(num_rounds=1, learning_rate=1e39, local_steps=1, proximal_weight=0.0)
    run.train()
    assert set(run.records[0].failed) == {"north", "south"}
    assert "The value of the client LoRA is not finite in step 1 of 1" in run.records[0].failed["north"]


def test_first_step_points_at_the_model(make_runner, monkeypatch):
    run = make_runner()
    break_loss(monkeypatch, run.server.trainer, 1)
    with pytest.raises(DivergenceError, match="in step 1 of .* Nothing was trained yet, so look at the model"):
        run.train()


@pytest.mark.slow
def test_processes_notice_together(tokenizer, tmp_path):
    """One process sees the loss, both leave the client out, and neither waits for the other."""
    save_files(tmp_path, tokenizer)
    config = Path(__file__).parents[2] / "accelerate_configs" / "cpu" / "ddp.yaml"
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--main_process_port",
        "0",
    ]
    script = Path(__file__).parent / "divergence_run.py"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*map(str, launcher), str(script), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for process in range(2):
        for record in json.loads((tmp_path / f"records-{process}.json").read_text()):
            assert record["weights"] == {"good": 1.0}
            assert "The loss of the client LoRA is not finite in step 2" in record["failed"]["bad"]
