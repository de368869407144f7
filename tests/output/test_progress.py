import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedbiot_trainer.output.progress import RunProgress
from fedbiot_trainer.shared.records import RoundRecord


def record(**changes):
    values = {
        "alignment_l2": 0.5,
        "client_losses": {"north": 1.0, "south": 2.0},
        "adap_emu_loss": 3.0,
        "adap_fu_loss": 2.5,
        "seconds": {"align": 1.0, "evaluate": 0.5},
        "counted": True,
        **changes,
    }
    return RoundRecord(2, **values)


@pytest.fixture
def make_progress():
    def make(terminal=False, enabled=True):
        return RunProgress(10, 3, 3, Console(file=io.StringIO(), force_terminal=terminal, width=100), enabled)

    return make


def printed(progress):
    return progress.console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "terminal"])
def test_a_round_in_one_line(make_progress, terminal):
    progress = make_progress(terminal)
    with progress:
        for _ in range(4):
            progress.step(0.7)
        progress.round_line(record())
    assert "round 2/3 | align L2 0.500 | north 1.000  south 2.000 | AdapEmu 3.000  AdapFu 2.500 | 1.5 s" in printed(
        progress
    )


def test_what_is_not_measured_is_not_shown(make_progress):
    progress = make_progress()
    progress.round_line(record(alignment_l2=None, adap_emu_loss=None, adap_fu_loss=None))
    assert printed(progress).startswith("round 2/3 | north 1.000  south 2.000 | 1.5 s")


def test_many_clients_are_summed_up(make_progress):
    progress = make_progress()
    progress.round_line(record(client_losses={f"c{i}": float(i) for i in range(9)}))
    assert "9 clients 4.000 (0.000-8.000)" in printed(progress)


def test_refusals_are_shown(make_progress):
    progress = make_progress()
    progress.round_line(record(client_losses={"[b]x[/b]": 1.0}, refused={"south": "`a` is [2, 3]"}))
    assert "refused the update of client 'south': `a` is [2, 3]" in printed(progress)


def test_clients_that_the_public_text_does_not_cover(make_progress):
    progress = make_progress()
    progress.round_line(record(uncovered={f"c{i}": "its loss is 9" for i in range(6)}))
    shown = printed(progress)
    assert shown.count("the public text does not cover client") == 4 and "client 'c0': its loss is 9" in shown
    assert "nor 2 other clients (`uncovered` in rounds.jsonl). Align on public text in their form" in shown
    progress.round_line(record())
    assert printed(progress).count("Align on public text") == 1


def test_absence_is_shown(make_progress):
    progress = make_progress()
    progress.round_line(record(client_losses={}, failed={"south": "OSError: no disk"}, counted=False))
    assert "round 2/3 | align L2 0.500 | too few answers | AdapEmu" in printed(progress)
    assert "no answer from client 'south': OSError: no disk" in printed(progress)


def test_names_are_no_markup(make_progress):
    progress = make_progress()
    progress.round_line(record(client_losses={"[b]x[/b]": 1.0}))
    assert "[b]x[/b] 1.000" in printed(progress)


def test_live_display_says_where_the_run_is(make_progress):
    progress = make_progress(terminal=True)
    with progress:
        progress.phase(2, "local training")
        progress.client("north")
        progress.step(0.731)
        progress._live.refresh()
    for text in ("round 2/3", "client north", "loss 0.731", "ETA"):
        assert text in printed(progress)


@pytest.fixture
def clock(monkeypatch):
    """Where a test sets the time."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("time.perf_counter", lambda: now.seconds)
    return now


def test_eta_counts_the_steps(make_progress, clock):
    progress = make_progress()
    assert progress.eta == "--:--"
    progress.steps_done, clock.seconds = 5, 30.0
    assert progress.eta == "0:30"
    progress.steps_done, progress.total_steps, clock.seconds = 1, 3, 3600.0
    assert progress.eta == "2:00:00"
    progress.skip(2)  # of an earlier run
    progress.steps_done, clock.seconds = 3, 30.0
    assert progress.eta == "0:00"


@pytest.mark.parametrize("resumed", [0, 4])
def test_eta_does_not_count_what_comes_before_the_steps(make_progress, clock, resumed):
    """Evaluations and hidden states of the public text take minutes, and are not repeated with each step."""
    progress = make_progress()  # 10 steps
    progress.skip(resumed)
    for phase in ("evaluating the full model", "hidden states of the public text"):
        progress.phase(0, phase)
        clock.seconds += 500
    progress.phase(0, "initial alignment")
    clock.seconds += 3
    progress.step(0.5)
    assert progress.eta == f"0:{3 * (9 - resumed):02}"
    progress.phase(1, "evaluating")  # as after each round
    clock.seconds += 2
    assert progress.eta == f"0:{5 * (9 - resumed):02}"


def test_eta_counts_rounds_whose_steps_are_not_seen(make_progress, clock):
    progress = make_progress()  # 10 steps, of which 1 comes before the 3 rounds
    clock.seconds = 500.0
    progress.phase(0, "evaluating the full model")
    progress.round_began()
    for phase in ("local training", "evaluating"):
        progress.phase(1, phase)
        clock.seconds += 20
    progress.round_ended(1)
    assert progress.eta == "1:00"  # 4 of 10 in 40 s


def test_eta_counts_steps_that_are_not_seen(make_progress, clock):
    """Those of clients on other machines."""
    progress = make_progress()  # 10 steps, of which 1 comes before the 3 rounds
    progress.step(0.5)
    clock.seconds = 80.0
    progress.round_ended(1)
    assert progress.eta == "2:00"  # 4 of 10 in 80 s
    progress.round_ended(3)
    assert progress.eta == "0:00"


def test_a_line_now_and_then_where_there_is_no_terminal():
    progress = RunProgress(10, 3, 3, Console(file=io.StringIO(), width=100), interval=0.05)
    with progress:
        progress.phase(2, "local training")
        progress.client("north")
        progress.step(0.731)
        while printed(progress).count("\n") < 2:
            time.sleep(0.01)
        progress.phase(2, "evaluating")
        progress.part(3, 7)
        while "evaluating" not in printed(progress):
            time.sleep(0.01)
    lines = printed(progress).splitlines()
    assert re.fullmatch(
        r"round 2/3 · local training · client north · step 1 · loss 0.731 · 0:00 so far \| ETA 0:0\d", lines[0]
    )
    assert "round 2/3 · evaluating · 3/7 · 0:00 so far | ETA" in printed(progress)


def test_nothing_is_printed_when_logging_is_off(make_progress):
    progress = make_progress(terminal=True, enabled=False)
    with progress:
        progress.step(0.5)
        progress.round_line(record())
    assert printed(progress) == ""
