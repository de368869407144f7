"""What only shows where several processes run: who writes, who stops, and what is left."""

import json
import re
from pathlib import Path

import pytest
import torch
from launches import ROOT, launch, run_two, save_run_files

from fedbiot_trainer.shared.lora_state import is_a, load_lora


pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    return save_run_files(tmp_path_factory.mktemp("files"), tokenizer)


@pytest.mark.slow
@pytest.mark.usefixtures("pass_at_k")
def test_metrics_of_two_processes_are_those_of_one(files, tmp_path):
    """The texts of both, in the order of the data, compared by one. 5 batches: one process runs the last for nothing."""
    script = ROOT / "tests" / "evaluation" / "metric_run.py"
    results = []
    for config in (None, "ddp"):
        folder = tmp_path / str(config)
        flags = ["--folder", folder, "--model", files / "base", "--data", files / "test.jsonl"]
        result = launch(script, *flags, config=config)
        assert result.returncode == 0, result.stderr[-5000:]
        results += [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    one, *two = results
    assert two == [one, one]
    assert len(set(one["completions"])) > 3
    assert (one["order"]["length"], one["order"]["rank"], one["pass_at_k"]) == (9, 0, {"pass_at_1": 0.5})


@pytest.mark.slow
def test_failing_process_ends_the_run(files, tmp_path):
    script = Path(__file__).parent / "distributed_run.py"
    result = launch(script, "--folder", tmp_path / "out", "--model", files / "base", "--watch", "fail", config="ddp")
    assert result.returncode != 0
    assert "RuntimeError: the disk of this machine is gone" in result.stderr
    assert len((tmp_path / "out" / "rounds.jsonl").read_text().splitlines()) >= 1  # nothing that was computed is lost


@pytest.mark.slow
def test_processes_stop_early_together(files, tmp_path):
    script = Path(__file__).parent / "distributed_run.py"
    flags = ["--folder", tmp_path / "out", "--model", files / "base", "--watch", "patience", "--num_rounds", 6]
    result = launch(script, *flags, config="ddp")
    assert result.returncode == 0, result.stderr[-5000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rounds"], summary["best_round"]) == (3, 1)


@pytest.mark.slow
def test_two_processes_keep_the_best_round(files, tmp_path):
    settings = {"load_best_model_at_end": "true", "metric_for_best_model": "adap_fu_loss", "learning_rate": 0.3}
    settings |= {"plug_in_scales": (1, 0.5)}
    folder = run_two(files, tmp_path, "ddp", **settings)
    summary = json.loads((folder / "summary.json").read_text())
    losses = [json.loads(line)["adap_fu_loss"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    values = summary["plug_in"]["values"]
    assert losses[summary["best_round"] - 1] == min(losses) == pytest.approx(values["1"])
    assert summary["best_round"] < 3  # at this learning rate
    assert values["1"] != values["0.5"] and min(values.values()) == pytest.approx(summary["adap_fu"]["loss"])
    full, packed = (load_lora(folder / name)[1] for name in ("client_lora", "emulator_package/client_lora"))
    for one, other in zip(sorted(full), sorted(packed), strict=True):
        assert torch.equal(full[one], packed[other] * (1 if is_a(one) else summary["plug_in"]["scale"]))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rounds(files, tmp_path):
    """26 rounds of 2 clients under ZeRO-3, compared from the second on."""
    pytest.importorskip("deepspeed")
    script = Path(__file__).parent / "distributed_run.py"
    flags = ["--folder", tmp_path / "out", "--model", files / "base", "--watch", "memory", "--num_rounds", 26]
    result = launch(script, *flags, config="zero3")
    assert result.returncode == 0, result.stderr[-5000:]
    resident = [int(value) for value in re.findall(r"^resident (\d+)", result.stdout, flags=re.MULTILINE)]
    assert len(resident) == 26
    assert resident[-1] < 1.03 * resident[1]
