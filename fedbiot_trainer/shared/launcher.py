"""The process that launched this one, if there is one. Imports no library."""

import os
import sys
from pathlib import Path


def launcher_pid(*names: str) -> int | None:
    """The process id of the parent, if one of `names` is in its command line: `"accelerate"`. Linux only."""
    parent = os.getppid()
    if sys.platform != "linux":
        return None
    command = Path(f"/proc/{parent}/cmdline").read_text(errors="replace")
    return parent if any(name in command for name in names) else None
