"""What the owner's commands make of what NVFlare says, which a stand-in says here."""

import sys
import time
from types import SimpleNamespace

import pytest

from fedbiot_trainer.cli import serve, status
from fedbiot_trainer.cli.main import main
from fedbiot_trainer.engines.nvflare.administrator import LOG, ServedRun


class Session:
    """A server whose jobs end one after another as they are told, each after it has written to the run's log."""

    def __init__(self, log, *ends):
        self.log, self.ends, self.submitted = log, list(ends), []

    def get_connected_client_list(self):
        return [SimpleNamespace(name="clinic")]

    def submit_job(self, folder):
        self.submitted.append(folder)
        status, text = self.ends.pop(0)
        if text:
            with self.log.open("a") as log:
                log.write(text)
        self.status = status
        return f"job-{len(self.submitted)}"

    def get_job_meta(self, job):
        return {"status": self.status}


@pytest.fixture
def serve_with(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "POLL", 0.01)
    job = SimpleNamespace(write_job=lambda folder, name, argument: folder)
    monkeypatch.setitem(sys.modules, "fedbiot_trainer.engines.nvflare.job", job)

    def run(*ends):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / LOG).write_text(serve.ENDED_FROM_OUTSIDE)  # of a run before
        order = {"folder": ".", "flags": ["--a", "1"], "min_sites": 1, "patience": 1.0}
        session = Session(folder / LOG, *ends)
        try:
            serve._serve(session, order, ServedRun.begin(tmp_path, folder))
        finally:
            run.submitted, run.flags = len(session.submitted), order["flags"]

    return run


def test_a_run_that_nvflare_ends_goes_on(serve_with, capsys):
    serve_with(("FINISHED:ABNORMAL", f"round 1\n{serve.ENDED_FROM_OUTSIDE}"), ("FINISHED:COMPLETED", "round 2\n"))
    assert serve_with.submitted == 2 and serve_with.flags == ["--a", "1", "--resume_from_checkpoint", "true"]
    assert "It goes on from its state" in capsys.readouterr().out


def test_a_run_that_ends_before_it_begins_is_submitted_again(serve_with, capsys):
    """NVFlare ends the job of all sites if it cannot start its process at one."""
    serve_with(("FINISHED:ABNORMAL", ""), ("FINISHED:COMPLETED", "round 1\n"))
    assert serve_with.submitted == 2 and serve_with.flags == ["--a", "1"]  # there is nothing to go on from
    assert "before it began. It is submitted again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "ends, submitted",
    [
        ([("FINISHED:ABNORMAL", "error: no\n")], 1),
        ([("FINISHED:EXECUTION_EXCEPTION", "")], 1),
        ([("FINISHED:ABNORMAL", "")] * 4, 4),
    ],
    ids=["its own error", "an error before it", "always"],
)
def test_a_run_that_cannot_go_on(serve_with, ends, submitted):
    with pytest.raises(RuntimeError, match=f"The run ended as {ends[0][0]}"):
        serve_with(*ends)
    assert serve_with.submitted == submitted


def test_a_site_that_is_silent_is_not_called_connected():
    assert status._connection(time.time()).startswith("connected, last heard of at 20")
    assert status._connection(time.time() - 120).startswith("not heard of for more than a minute, last heard of at 20")
    assert status._connection(None) == "not heard of for more than a minute, last heard of at an unknown time"


@pytest.mark.parametrize(
    "flags, error",
    [
        (
            ["--model_name_or_path", "/nowhere/model"],
            "`model_name_or_path` is '/nowhere/model', but there is no such folder",
        ),
        (["--dataset_name", "a.jsonl"], "`dataset_name` is a.jsonl, but the clients have their text at their sites"),
    ],
    ids=["model", "text"],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_imported(flags, error, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fedbiot_trainer.cli.serve", None)  # which cannot be imported then
    with pytest.raises(SystemExit):
        main(["serve", "--kit", "kit", "--public_dataset_name", "org/public", *flags])
    assert f"fedbiot serve: error: {error}" in capsys.readouterr().err
