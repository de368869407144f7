"""
What the owner's commands do with the server: they connect to it by the administrator's kit, where the run that `fedbiot serve`
has begun is noted for the others. It loads nothing of the training, and NVFlare only to connect.
"""

import json
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from nvflare.fuel.flare_api.flare_api import Session


APP = "fedbiot"  # the name of our jobs
FILE = "fedbiot_run.json"
LOG = "log.txt"  # of a run, in its folder
GO_ON = "To go on: --resume_from_checkpoint true"
ENDED = "FINISHED"  # how the status begins of a job that is over
END_SECONDS = 60.0  # NVFlare kills a job's process 10 s after it was told to end


def administrator_kit(kit: Path | None) -> Path:
    """
    The kit of a command of the owner's.

    Raises:
        FileNotFoundError: If it is none.
    """
    if kit is None or not (kit / "startup" / "fed_admin.json").is_file():
        raise FileNotFoundError(f"`kit` is '{kit}', but that is no startup kit of an administrator.")
    return kit.absolute()


def open_session(kit: str | Path, timeout: float = 60.0) -> "Session":
    """
    Connect to the server as its administrator.

    Args:
        kit (`str` or `Path`): Folder of the administrator's startup kit.
        timeout (`float`, *optional*): Seconds to wait for the server.

    Raises:
        ConnectionError: If there is none.
    """
    from nvflare.apis.fl_exception import FLCommunicationError
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    name = json.loads((Path(kit) / "startup" / "fed_admin.json").read_text())["admin"]["username"]
    try:
        return new_secure_session(name, str(kit), timeout=timeout)
    except (ConnectionError, FLCommunicationError) as error:
        raise ConnectionError(
            f"`kit` is '{kit}', whose server has not answered for {timeout:g} s. Start it, by `startup/start.sh` in its own kit."
        ) from error


def wait_for_sites(session: "Session", sites: Collection[str], timeout: float) -> list[str]:
    """
    Wait until sites are connected: a site that connects after a job has started takes no part in it.

    Returns:
        `list[str]`: Those of them that are, in the end.
    """
    deadline = time.monotonic() + timeout
    while True:
        connected = {client.name for client in session.get_connected_client_list()}
        here = [site for site in sites if site in connected]
        if len(here) == len(sites) or time.monotonic() > deadline:
            return here
        time.sleep(1.0)


@dataclass
class ServedRun:
    """
    What is known of a run outside of the process that began it.

    Attributes:
        kit (`str`): The administrator's kit, which has one run at a time.
        output_dir (`str`): The run's folder.
        pid (`int`): The process of `fedbiot serve`, which submits the job anew where NVFlare has ended it.
        is_stopped (`bool`): Whether the owner wants it to end.
    """

    kit: str
    output_dir: str
    pid: int
    is_stopped: bool = False

    @classmethod
    def begin(cls, kit: Path, output_dir: Path) -> "ServedRun":
        """
        Note that a run is being served.

        Raises:
            ValueError: If the kit is serving another one.
        """
        other = cls.find(kit)
        if other is not None and other.is_served and other.pid != os.getpid():
            raise ValueError(
                f"`kit` is '{kit}', with which process {other.pid} serves the run of '{other.output_dir}'. Wait for it, or end it "
                "with `fedbiot stop`."
            )
        run = cls(str(kit), str(output_dir.absolute()), os.getpid())
        run.save()
        return run

    @classmethod
    def find(cls, kit: Path) -> "ServedRun | None":
        """The run that was served last, if any was."""
        file = kit / FILE
        return cls(**json.loads(file.read_text())) if file.is_file() else None

    def save(self):
        """Put it in the kit, where a reader finds the old or the new one as a whole."""
        part = Path(self.kit, FILE + ".part")
        part.write_text(json.dumps(asdict(self), indent=2))
        part.rename(Path(self.kit, FILE))

    @property
    def is_served(self) -> bool:
        """Whether its `fedbiot serve` is there to submit it again."""
        try:
            return b"serve" in Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except FileNotFoundError:
            return False

    @property
    def was_stopped(self) -> bool:
        """Whether `fedbiot stop` was called since it began."""
        found = ServedRun.find(Path(self.kit))
        return found is not None and found.is_stopped


def running_jobs(session: "Session") -> list[str]:
    """Identifiers of the federated runs that are going on or wait to begin."""
    jobs = session.list_jobs(name_prefix=APP)
    return [job["job_id"] for job in jobs if not job["status"].startswith(ENDED)]


def end_job(session: "Session", job: str):
    """Abort a job, and wait until its process is gone, and so its run's folder is free."""
    session.abort_job(job)
    session.wait_for_job(job, timeout=END_SECONDS)
