"""The `accelerate launch` around this process, if there is one. Imports no library."""

import os
import sys
from pathlib import Path


def launcher_pid() -> int | None:
    """The process id of the `accelerate launch` that started this process, if one did. Linux only."""
    parent = os.getppid()
    if sys.platform != "linux" or b"accelerate" not in Path(f"/proc/{parent}/cmdline").read_bytes():
        return None
    return parent
