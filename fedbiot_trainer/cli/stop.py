"""
End the run that `fedbiot serve` has begun, whichever terminal that is in. Its state stays on disk.

    fedbiot stop --kit kits/owner@fedbiot.org
"""

import argparse
import sys
import time
from pathlib import Path

from ..engines.errors import check_installed
from ..engines.nvflare.administrator import (
    END_SECONDS,
    GO_ON,
    ServedRun,
    administrator_kit,
    end_job,
    open_session,
    running_jobs,
)


def main(argv: list[str] | None = None):
    """
    Stop it.

    Raises:
        ValueError: If no run is going on.
        TimeoutError: If it does not end.
    """
    check_installed("nvflare", "nvflare")
    parser = argparse.ArgumentParser(
        "fedbiot stop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, required=True, help="The administrator's startup kit.")
    kit = administrator_kit(parser.parse_args(argv).kit)
    run = ServedRun.find(kit)
    served = run if run is not None and run.is_served else None
    if served is not None:
        served.is_stopped = True  # `serve` ends its job, and submits none any more
        served.save()
    session = open_session(kit)
    try:
        jobs = running_jobs(session)
        if not jobs and served is None:
            raise ValueError(f"`kit` is '{kit}', with which no run is going on.")
        for job in jobs:
            end_job(session, job)
        deadline = time.monotonic() + END_SECONDS
        while served is not None and served.is_served:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Process {served.pid}, `fedbiot serve`, has not ended within {END_SECONDS:g} s.")
            time.sleep(0.2)
    finally:
        session.close()
    sys.stdout.write(f"The run of {run.output_dir if run is not None else 'another kit'} has ended. {GO_ON}\n")
