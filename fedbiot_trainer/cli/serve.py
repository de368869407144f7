"""
The owner's side of a run whose clients are at sites of their own. The settings are those of `fedbiot train`, without the
clients' text; the run itself goes on in the server that the owner's kit has started on this machine.

    fedbiot serve --kit kits/owner@fedbiot.org --min_sites 3 --config run.yaml

--kit KIT is the administrator's startup kit. A round waits for --min_sites N (default: 1) at most
--patience X seconds (600), once for each time that one leaves.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config import FedBiOTConfig
from ..engines.errors import check_installed
from ..engines.nvflare.administrator import GO_ON, LOG, ServedRun, administrator_kit, end_job, open_session
from ..engines.remote import Carrier, RemoteClients
from ..federation.interruption import RunInterrupted
from ..federation.runner import FederatedRunner
from .early import check_sources
from .train import FederatedScriptArguments, make_parser, prepare


ENDED_FROM_OUTSIDE = "NVFlare ends the run. Its state is on disk.\n"
ABNORMAL = "FINISHED:ABNORMAL"  # a process of NVFlare's own has failed, and so not by an error of the run's
POLL = 1.0  # seconds between two looks at the run
MAX_RESTARTS = 3


@dataclass
class OwnerScriptArguments(FederatedScriptArguments):
    """
    Where the owner's texts come from: public text, and held-out text. A dataset is a name on the Hub, a folder, or a file
    on this machine or under an https address.
    """

    def __post_init__(self):
        check_sources(self, are_remote=True)
        if self.method != "fedbiot" or self.plan_only:
            raise ValueError(
                f"`method` is '{self.method}' and `plan_only` is {self.plan_only}, but what is served is a run of FedBiOT as it is "
                "set. Compare methods, or plan, with `fedbiot train`."
            )


def run(carrier: Carrier, argument: str):
    """
    What the server runs: a federated run with the sites that `carrier` reaches, as the command line has it. `argument` names
    the file that says how: it goes to the sites with the job, which the owner's settings and paths should not.
    """
    order = json.loads(Path(argument).read_text())
    os.chdir(order["folder"])
    prepared = _prepare(order["flags"])
    folder = Path(prepared["args"].output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", buffering=1) as log:

        def pool(package: Path) -> RemoteClients:
            clients = RemoteClients(carrier, package, order["min_sites"], order["patience"])
            clients.on_wait = lambda line: print(line, file=log)
            return clients

        try:
            runner = FederatedRunner(**prepared, remote_clients=pool)
            runner.console = Console(file=log, width=120)
            runner.interruption.is_ending = carrier.is_ending
            runner.train()
        except RunInterrupted:
            log.write(ENDED_FROM_OUTSIDE)
            raise
        except Exception as error:
            log.write(f"error: {error or type(error).__name__}\n")
            raise


def _prepare(flags: list[str]) -> dict:
    return prepare(*make_parser(OwnerScriptArguments, "serve", __doc__ or "").parse_args_and_config(flags))


def main(argv: list[str] | None = None):
    """
    Submit the run that the command line or `argv` asks for, show it, and end with it. One that is stopped, by Ctrl-C or `fedbiot
    stop`, exits as `fedbiot train` does.
    """
    check_installed("nvflare", "nvflare")
    parser = argparse.ArgumentParser("fedbiot serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--kit", type=Path)
    parser.add_argument("--min_sites", type=int, default=1)
    parser.add_argument("--patience", type=float, default=600.0)
    own, flags = parser.parse_known_args(sys.argv[2:] if argv is None else argv)
    args: FedBiOTConfig = _prepare(flags)["args"]  # what cannot work is said here and now
    kit = administrator_kit(own.kit)
    order = {"folder": os.getcwd(), "flags": flags, "min_sites": own.min_sites, "patience": own.patience}
    run = ServedRun.begin(kit, Path(args.output_dir))
    session = open_session(kit)
    try:
        _serve(session, order, run)
    except RunInterrupted as interruption:
        sys.stderr.write(f"{interruption}. {GO_ON}\n")
        sys.exit(128 + interruption.signal)
    except ConnectionError as error:
        raise ConnectionError(
            f"The server of `kit` ('{own.kit}') does not answer: {error}. Start it; if there is a state in the run's folder, it can go "
            "on with `--resume_from_checkpoint true`."
        ) from error
    finally:
        session.close()


def _serve(session, order: dict, run: ServedRun):
    """Submit a run, and again where NVFlare ends it, until it is over."""
    from ..engines.nvflare.job import write_job

    log = Path(run.output_dir) / LOG
    shown = log.stat().st_size if log.is_file() else 0
    flags = order["flags"]
    for restarts in range(MAX_RESTARTS + 1):
        _wait_for_sites(session, order["min_sites"], order["patience"], run)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "order.json")
            file.write_text(json.dumps(order))
            job = session.submit_job(str(write_job(Path(folder, "job"), f"{__name__}:run", str(file))))
            before = shown
            status, shown = _follow(session, job, log, shown, run)
        if status == "FINISHED:COMPLETED":
            return
        if run.was_stopped:  # after the last look at it
            raise RunInterrupted(signal.SIGTERM)
        # NVFlare ends a job when it loses a process of its own at one site, or cannot start one there.
        has_begun = shown > before
        was_ended = log.read_text().endswith(ENDED_FROM_OUTSIDE) if has_begun else status == ABNORMAL
        if restarts == MAX_RESTARTS or not was_ended:
            break
        if has_begun:
            sys.stdout.write("NVFlare has ended the run. It goes on from its state.\n")
            order["flags"] = [*flags, "--resume_from_checkpoint", "true"]
        else:
            sys.stdout.write("NVFlare has ended the run before it began. It is submitted again.\n")
    raise RuntimeError(
        f"The run ended as {status}. The server's log in its kit says more. If there is a state in the run's folder, it can go on "
        "with `--resume_from_checkpoint true`."
    )


def _wait_for_sites(session, min_sites: int, patience: float, run: ServedRun):
    deadline = time.monotonic() + patience
    while len(session.get_connected_client_list()) < min_sites:
        if run.was_stopped:
            raise RunInterrupted(signal.SIGTERM)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"`min_sites` is {min_sites}, but fewer have connected within `patience` ({patience:g} s)."
            )
        time.sleep(POLL)


def _follow(session, job: str, log: Path, shown: int, run: ServedRun) -> tuple[str, int]:
    """Print what a job logs until it ends. Returns how it ended, and how far the log was read."""
    status = ""
    try:
        while not status.startswith("FINISHED"):
            time.sleep(POLL)
            if run.was_stopped:  # also where that was before there was a job
                raise RunInterrupted(signal.SIGTERM)
            status = str(session.get_job_meta(job)["status"])
            shown = _show(log, shown)
    except KeyboardInterrupt as interruption:
        end_job(session, job)
        _show(log, shown)
        raise RunInterrupted(getattr(interruption, "signal", signal.SIGINT)) from None
    return status, shown


def _show(log: Path, shown: int) -> int:
    """Print what is new in a file. Returns how far it was read."""
    if log.is_file():
        with log.open() as file:
            file.seek(shown)
            sys.stdout.write(file.read())
            sys.stdout.flush()
            shown = file.tell()
    return shown
