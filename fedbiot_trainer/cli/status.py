"""
How the owner's server, its sites and the run that `fedbiot serve` has begun are doing.

    fedbiot status --kit kits/owner@fedbiot.org
"""

import argparse
import json
import sys
import time
from pathlib import Path

from ..engines.errors import check_installed
from ..engines.nvflare.administrator import LOG, ServedRun, administrator_kit, open_session, running_jobs


SILENT = 60.0  # seconds; a site of NVFlare sends a sign of life every 10


def main(argv: list[str] | None = None):
    """Say what is going on."""
    check_installed("nvflare", "nvflare")
    parser = argparse.ArgumentParser(
        "fedbiot status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kit", type=Path, required=True, help="The administrator's startup kit.")
    kit = administrator_kit(parser.parse_args(argv).kit)
    session = open_session(kit)
    try:
        system, jobs = session.get_system_info(), running_jobs(session)
    finally:
        session.close()
    lines = [f"server  up since {_clock(system.server_info.start_time)}"]
    for site in sorted(system.client_info, key=lambda client: client.name):
        lines.append(f"site    {site.name}: {_connection(site.last_connect_time)}")
    if not system.client_info:
        lines.append("site    none is connected")
    lines += [f"run     {line}" for line in _describe(ServedRun.find(kit), bool(jobs))]
    sys.stdout.write("\n".join(lines) + "\n")


def _connection(last_heard: float | None) -> str:
    is_silent = last_heard is None or time.time() - last_heard > SILENT
    how = "not heard of for more than a minute" if is_silent else "connected"
    return f"{how}, last heard of at {_clock(last_heard)}"


def _describe(run: ServedRun | None, is_going_on: bool) -> list[str]:
    if run is None:
        return ["going on, begun with another kit" if is_going_on else "none"]
    folder = Path(run.output_dir)
    if is_going_on:
        how = "going on" if run.is_served else "going on, with no `fedbiot serve` that would submit it again"
    elif run.is_served:
        how = "waiting for sites, or about to begin"
    else:
        how = "stopped" if run.is_stopped else "over"
    lines = [f"{how}, in {folder}"]
    rounds = (folder / "rounds.jsonl").read_text().splitlines() if (folder / "rounds.jsonl").is_file() else []
    if rounds:
        record = json.loads(rounds[-1])
        absent = {**record["failed"], **record["refused"]}
        lines.append(
            f"round {record['server_round']} is the last that has ended; answers of {', '.join(record['weights'])}"
        )
        lines += [f"  without {name}: {why}" for name, why in absent.items()]
    log = (folder / LOG).read_text().splitlines() if (folder / LOG).is_file() else []
    return lines + [f"  {line.strip()}" for line in log[-1:]]


def _clock(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
