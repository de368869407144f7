import io
import json
from dataclasses import replace

import pytest
from peft import LoraConfig
from rich.console import Console

from fedbiot_trainer.output.figures import plot_rounds
from fedbiot_trainer.output.tables import format_bytes, result_lines, result_table, split_table
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared.records import ParameterCounts, PlugIn, RoundRecord, RunSummary, SplitRecord


SUMMARY = RunSummary(
    zero_shot={"loss": 4.0, "exact_match": 0.1},
    adap_emu={"loss": 2.0, "exact_match": 0.4},
    adap_fu={"loss": 1.5, "exact_match": 0.75},
    split=SplitRecord(8, [0, 3, 5], [1, 2, 4], [6, 7]),
    rounds=7,
    processes={"number": 1, "type": "NO"},
    bytes={"down": 2_500_000, "up": 900, "once_per_client": 12_000},
    seconds={"total": 61.0},
    parameters=ParameterCounts(100, 60, 20, 4, 6),
    num_examples={"a": 3},
    num_public_examples=0,
    tokens_per_example={"clients": 7.0, "public": None},
    initial_alignment={},
    settings={"eval_rounds": 1},
    peft_config={},
    versions={},
)


def test_summary_round_trip(tmp_path):
    SUMMARY.write(tmp_path / "summary.json")
    assert RunSummary.read(tmp_path / "summary.json") == SUMMARY
    assert json.loads((tmp_path / "summary.json").read_text())["parameters"]["client_share"] == 0.6


def text(renderable):
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize(
    "size, expected",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (13e9, "13.0 GB"), (2e12, "2000.0 GB")],
)
def test_format_bytes(size, expected):
    assert format_bytes(size) == expected


def test_split_table(model):
    models = SplitModel(model, 2, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    parameters = models.count_parameters()
    shown = text(split_table(models.split.record(), parameters, 12_000, (3000, 1000), 5))
    for expected in (
        "0, 3, 5",
        "1, 2, 4",
        "6, 7",
        f"{parameters.full:,}",
        "5 of 8",
        "12.0 kB",
        "3.0 kB down, 1.0 kB up",
    ):
        assert expected in shown


def test_result_shows_gain_and_gap():
    shown = text(result_table(SUMMARY))
    [gain] = [line for line in shown.splitlines() if "gain" in line]
    [gap] = [line for line in shown.splitlines() if "gap" in line]
    assert "-2.5000" in gain and "+65.0%" in gain
    assert "-0.5000" in gap and "+35.0%" in gap


def test_only_shares_are_shown_in_percent():
    metrics = {"loss": 1.0, "token_accuracy": 0.5, "pass_at_10": 0.25, "bleu_length": 2.0}
    shown = text(result_table(replace(SUMMARY, zero_shot=metrics, adap_emu=metrics, adap_fu=metrics)))
    [row] = [line for line in shown.splitlines() if "zero-shot full model" in line]
    assert row.split()[-7::2] == ["1.0000", "50.0%", "25.0%", "2.0000"]


def test_result_lines(tmp_path):
    lines = result_lines(SUMMARY, tmp_path)
    assert lines[1] == "bytes: 2.5 MB down and 900 B up in 7 rounds, 12.0 kB once to each client"
    assert lines[2] == f"time: 61 s, results in {tmp_path}"


def test_result_lines_of_what_was_chosen(tmp_path):
    plug_in = PlugIn(0.5, "eval_adap_fu_loss", {"0.5": 1.25, "1": 1.5})
    lines = result_lines(replace(SUMMARY, best_round=3, plug_in=plug_in), tmp_path)
    assert lines[1:3] == [
        "result: round 3, the best of 7",
        "client LoRA plugged in at 0.5 of its strength: eval_adap_fu_loss 1.2500 at 0.5, 1.5000 at 1",
    ]
    seldom = replace(SUMMARY, best_round=4, settings={"eval_rounds": 2})
    assert result_lines(seldom, tmp_path)[1] == "result: round 4, the best of those evaluated"


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "not evaluated"])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "not aligned"])
@pytest.mark.parametrize("losses", [{"a": 2.0}, {}], ids=["clients", "no valid update"])
def test_figure_of_any_run(tmp_path, evaluated, aligned, losses):
    record = RoundRecord(
        server_round=1,
        zero_shot_loss=4.0 if evaluated else None,
        adap_emu_loss=0.2 if evaluated else None,
        adap_fu_loss=0.1 if evaluated else None,
        alignment_l2=0.3 if aligned else None,
        alignment_kl=0.001 if aligned else None,
        client_losses=losses,
    )
    plot_rounds([record, replace(record, server_round=2)], tmp_path / "rounds.png")
    assert (tmp_path / "rounds.png").stat().st_size > 10_000
