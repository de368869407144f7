"""The job that NVFlare runs: which of our classes works where. It names no site, and brings no code."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from .administrator import APP
from .owner import TASK
from .provision import CONTROLLER, EXECUTOR


TASK_REQUEST_SECONDS = 0.2  # between two questions of an idle site whether there is something to do
DEAD_SITE_SECONDS = 30.0  # after NVFlare misses a site, before no answer of it is awaited


def write_job(folder: str | Path, function: str, argument: str = "", min_sites: int = 1) -> Path:
    """
    Write the folder that is submitted. All sites that are connected when the job starts take part.

    Args:
        folder (`str` or `Path`): Made anew.
        function (`str`): `package.module:function`. It runs on the owner's machine as `function(carrier, argument)`.
        argument (`str`, *optional*): Handed to it. NVFlare sends the whole folder to the sites: no secret goes in it.
        min_sites (`int`, *optional*): NVFlare starts the job with this many sites, and ends it with fewer.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    if folder.exists():
        shutil.rmtree(folder)
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    encoded = base64.b64encode(argument.encode()).decode()  # of plain text, NVFlare replaces what stands in braces
    meta = {"name": APP, "resource_spec": {}, "min_clients": min_sites, "deploy_map": {"app": ["@ALL"]}}
    server = {
        "format_version": 2,
        "server": {"task_request_interval": TASK_REQUEST_SECONDS},
        "dead_client_grace_period": DEAD_SITE_SECONDS,
        "workflows": [{"id": APP, "path": CONTROLLER, "args": {"function": function, "argument": encoded}}],
        "components": [],
    }
    client = {
        "format_version": 2,
        "executors": [{"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}}],
        "components": [],
    }
    _write(folder / "meta.json", meta)
    _write(config / "config_fed_server.json", server)
    _write(config / "config_fed_client.json", client)
    return folder


def _write(path: Path, content: dict[str, Any]):
    path.write_text(json.dumps(content, indent=2))
