"""How a command ends that failed: with a line of its own, and that as the last one."""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from ..shared.launcher import launcher_pid


PACKAGE = Path(__file__).resolve().parents[1]
WAIT = 60  # seconds for a launcher to end
# The launcher shows where it failed itself, which is not where the reason is.
REPEAT = """
import pathlib, socket, sys, time
try:  # of several processes that failed, one repeats its line
    only = socket.socket(socket.AF_UNIX)
    only.bind(f"\\0fedbiot-error-{sys.argv[1]}")
except OSError:
    sys.exit()
status, line, seconds = pathlib.Path(f"/proc/{sys.argv[1]}/status"), sys.argv[2], float(sys.argv[3])
while seconds > 0 and status.exists() and "State:\\tZ" not in status.read_text():
    time.sleep(0.02)
    seconds -= 0.02
sys.stderr.write(line)
"""


def end_with_error(command: str, error: Exception) -> NoReturn:
    """
    Exit with 1 after a line that tells the error. Before it comes the traceback, if the error is not one of this
    package's own, which say what to do.
    """
    if not _is_own(error):
        traceback.print_exception(error)
    line = f"{command}: error: {str(error) or type(error).__name__}\n"
    sys.stderr.write(line)
    sys.stderr.flush()
    launcher = launcher_pid("accelerate")
    if launcher is not None:
        line = f"\n{line}"
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", REPEAT, str(launcher), line, str(WAIT)], start_new_session=True
        )
    sys.exit(1)


def _is_own(error) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and Path(frame.tb_frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)
