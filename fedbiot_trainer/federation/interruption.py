"""Stopping a run from outside: SIGTERM or Ctrl-C ends it after the current step, a second one at once."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from ..shared.launcher import launcher_pid


PR_SET_PDEATHSIG = 1
LAUNCHER_GONE = signal.SIGUSR2  # not SIGHUP, which `nohup` has ignored; ends a process that does not listen


class RunInterrupted(KeyboardInterrupt):
    """
    A run that was stopped from outside. Its state is on disk.

    Attributes:
        signal (`signal.Signals`): What stopped it. A process that ends for it exits with `128 + signal`.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = signal.Signals(number)


class Interruption(TrainerCallback):
    """
    Whether a run was told to stop, in any of its processes. As a callback of a trainer, it is asked after each step.

    Attributes:
        is_ending (`Callable`): Asked as well, where more than signals can end the run.

    Raises (from [`check`]):
        RunInterrupted: If it was.
    """

    def __init__(self):
        self.received: int | None = None
        self.is_ending: Callable[[], bool] = lambda: False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in the block. Only the main thread can; in another one, Python's own handlers stay."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT, LAUNCHER_GONE)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number, frame):
        if self.received is None:
            self.received = number
        elif number != LAUNCHER_GONE:  # the launcher goes down with the first signal
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is set in any process. All must ask."""
        state = PartialState()
        if state.num_processes == 1:
            return flag
        return bool(reduce(torch.tensor(float(flag), device=state.device)))

    def check(self):
        """Raise [`RunInterrupted`] if any process was told to stop. All must ask."""
        if self.anywhere(self.received is not None or self.is_ending()):
            number = self.received if self.received in (signal.SIGINT, signal.SIGTERM) else signal.SIGTERM
            raise RunInterrupted(number)

    def on_step_end(self, args, state, control, **kwargs):
        self.check()


def end_with_launcher():
    """
    Be told when the `accelerate launch` or comparison that started this process is gone: killed, it would leave it
    running. Linux only; a shell that started the process directly may go.
    """
    parent = launcher_pid("accelerate", "compare.py")
    if parent is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_GONE)
    if os.getppid() != parent:  # it was gone before
        os.kill(os.getpid(), LAUNCHER_GONE)
