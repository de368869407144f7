"""
The owner's side of a run whose clients are at sites of their own. The settings are those of `fedbiot train`, without the
clients' text; the run itself goes on in the server that the owner's kit has started on this machine.

    fedbiot serve --kit kits/owner@fedbiot.org --min_sites 3 --config run.yaml
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
from ..engines.remote import Carrier, RemoteClients
from ..federation.runner import FederatedRunner
from .early import check_sources
from .train import FederatedScriptArguments, make_parser, prepare


LOG = "log.txt"  # of the run, in its folder
POLL = 1.0  # seconds between two looks at the run


@dataclass
class OwnerScriptArguments(FederatedScriptArguments):
    """
    Where the owner's texts come from: public text, and held-out text. A dataset is a name on the Hub, a folder, or a file
    on this machine or under an https address.
    """

    def __post_init__(self):
        check_sources(self, are_remote=True)


def run(carrier: Carrier, argument: str):
    """What the server runs: a federated run with the sites that `carrier` reaches, as the command line has it."""
    order = json.loads(argument)
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
    from ..engines.nvflare.job import open_session, write_job

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
        deadline = time.monotonic() + own.patience
        while len(session.get_connected_client_list()) < own.min_sites:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"`min_sites` is {own.min_sites}, but fewer have connected within `patience` ({own.patience:g} s)."
                )
            time.sleep(POLL)
        with tempfile.TemporaryDirectory() as folder:
            run_of_server = f"{__name__}:{run.__name__}"
            job = session.submit_job(str(write_job(Path(folder, "job"), run_of_server, json.dumps(order))))
        try:
            status = ""
            while not status.startswith("FINISHED"):
                time.sleep(POLL)
                status = str(session.get_job_meta(job)["status"])
                shown = _show(log, shown)
        except KeyboardInterrupt:
            session.abort_job(job)
            sys.exit("stopped. To go on: --resume_from_checkpoint true")
    finally:
        session.close()
    if status != "FINISHED:COMPLETED":
        raise RuntimeError(
            f"The run ended as {status}. The server's log in its kit says more; its state is in the run's folder."
        )


def _show(log: Path, shown: int) -> int:
    """Print what is new in a file. Returns how far it was read."""
    if log.is_file():
        with log.open() as file:
            file.seek(shown)
            sys.stdout.write(file.read())
            sys.stdout.flush()
            shown = file.tell()
    return shown
