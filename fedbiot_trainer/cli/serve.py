"""
The owner's side of a run whose clients are at sites of their own. The settings are those of `fedbiot train`, without the
clients' text; the run itself goes on in the server that the owner's kit has started on this machine.

    fedbiot serve --kit kits/owner@fedbiot.org --min_sites 3 --config run.yaml

--kit KIT is the administrator's startup kit. A round waits for --min_sites N (default: 1) at most --patience X seconds (600).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..config import FedBiOTConfig
from ..engines.errors import check_installed
from ..engines.remote import Carrier, RemoteClients
from ..federation.runner import FederatedRunner
from .early import check_sources
from .train import FederatedScriptArguments, make_parser, prepare


LOG = "log.txt"  # of the run, in its folder
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
    runner = FederatedRunner(
        **prepared,
        remote_clients=lambda package: RemoteClients(carrier, package, order["min_sites"], order["patience"]),
    )
    runner.folder.path.mkdir(parents=True, exist_ok=True)
    with (runner.folder.path / LOG).open("a", buffering=1) as log:
        runner.console = Console(file=log, width=120)
        try:
            runner.train()
        except Exception as error:
            log.write(f"error: {error or type(error).__name__}\n")
            raise


def _prepare(flags: list[str]) -> dict:
    return prepare(*make_parser(OwnerScriptArguments, "serve", __doc__ or "").parse_args_and_config(flags))


def main(argv: list[str] | None = None):
    """Submit the run that the command line or `argv` asks for, show it, and end with it."""
    check_installed("nvflare", "nvflare")
    from ..engines.nvflare.job import open_session, write_job
    from ..engines.nvflare.owner import ABORTED

    parser = argparse.ArgumentParser("fedbiot serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--kit", type=Path)
    parser.add_argument("--min_sites", type=int, default=1)
    parser.add_argument("--patience", type=float, default=600.0)
    own, flags = parser.parse_known_args(sys.argv[2:] if argv is None else argv)
    args: FedBiOTConfig = _prepare(flags)["args"]  # what cannot work is said here and now
    if own.kit is None or not (own.kit / "startup").is_dir():
        raise FileNotFoundError(f"`kit` is '{own.kit}', but that is no startup kit. Pass the administrator's.")
    order = {"folder": os.getcwd(), "flags": flags, "min_sites": own.min_sites, "patience": own.patience}
    log = Path(args.output_dir) / LOG
    shown = log.stat().st_size if log.is_file() else 0
    session = open_session(own.kit)
    try:
        for restarts in range(MAX_RESTARTS + 1):
            _wait_for_sites(session, own.min_sites, own.patience)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "order.json")
                file.write_text(json.dumps(order))
                job = session.submit_job(str(write_job(Path(folder, "job"), f"{__name__}:{run.__name__}", str(file))))
                status, shown = _follow(session, job, log, shown)
            if status == "FINISHED:COMPLETED":
                return
            # NVFlare ends a job when it loses a process of its own at one site.
            if restarts == MAX_RESTARTS or not log.is_file() or not log.read_text().endswith(f"error: {ABORTED}\n"):
                break
            sys.stdout.write("NVFlare has ended the run. It goes on from its state.\n")
            order["flags"] = [*flags, "--resume_from_checkpoint", "true"]
    except ConnectionError as error:
        raise ConnectionError(
            f"The server of `kit` ('{own.kit}') does not answer: {error}. Start it; if there is a state in the run's folder, it can go "
            "on with `--resume_from_checkpoint true`."
        ) from error
    finally:
        session.close()
    raise RuntimeError(
        f"The run ended as {status}. The server's log in its kit says more. If there is a state in the run's folder, it can go on "
        "with `--resume_from_checkpoint true`."
    )


def _wait_for_sites(session, min_sites: int, patience: float):
    deadline = time.monotonic() + patience
    while len(session.get_connected_client_list()) < min_sites:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"`min_sites` is {min_sites}, but fewer have connected within `patience` ({patience:g} s)."
            )
        time.sleep(POLL)


def _follow(session, job: str, log: Path, shown: int) -> tuple[str, int]:
    """Print what a job logs until it ends. Returns how it ended, and how far the log was read."""
    status = ""
    try:
        while not status.startswith("FINISHED"):
            time.sleep(POLL)
            status = str(session.get_job_meta(job)["status"])
            shown = _show(log, shown)
    except KeyboardInterrupt:
        session.abort_job(job)
        sys.exit("stopped. To go on: --resume_from_checkpoint true")
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
