"""What is shown while a run goes on: one live display in a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from ..shared.records import RoundRecord
from ..shared.round_trainer import RoundTrainer


MAX_NAMED_CLIENTS = 4  # more are summed up in a round's line
SECONDS_BETWEEN_LINES = 30.0  # at most, where there is no terminal


class RunProgress:
    """
    Progress of a federated run, counted in optimizer steps.

    In a terminal it is one live line. Elsewhere, a plain line is printed whenever nothing was for a while, in every
    phase: a thread sees to it, however long a single step takes.

    Args:
        total_steps (`int`): All steps of the whole run: alignment, local ones, and those after the rounds.
        num_rounds (`int`): Rounds of the run.
        steps_per_round (`int`): How many of them are a round's, of all its clients.
        console (`rich.console.Console`): Where to print. Live only if it is a terminal.
        enabled (`bool`, *optional*, defaults to `True`): Whether to print anything.
        interval (`float`, *optional*): Seconds between plain lines, at most.
        steps_after (`int`, *optional*, defaults to `0`): How many of them come after the last round.
    """

    def __init__(
        self,
        total_steps: int,
        num_rounds: int,
        steps_per_round: int,
        console: Console,
        enabled: bool = True,
        interval: float = SECONDS_BETWEEN_LINES,
        steps_after: int = 0,
    ):
        self.console, self.num_rounds, self.enabled, self.interval = console, num_rounds, enabled, interval
        self.total_steps, self.steps_done, self._steps_before = total_steps, 0, 0
        self.steps_per_round, self.steps_after = steps_per_round, steps_after
        self._phase_started = self._last_line = time.perf_counter()
        self._rate_since, self._rate_counts = self._phase_started, False
        self._where = self._client = self._counted = self._loss = ""
        self._phase_steps = 0
        self._ended = threading.Event()
        self._live = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._live.add_task("starting", total=total_steps, eta="--:--")

    def __enter__(self) -> "RunProgress":
        self._last_line = time.perf_counter()
        self._live.start()
        if self.enabled and not self.console.is_terminal:
            threading.Thread(target=self._speak, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._live.stop()

    def skip(self, steps: int):
        """Count steps that an earlier run took."""
        self.steps_done = self._steps_before = steps
        self._live.update(self._task, completed=steps)

    def round_began(self):
        """From here on all time counts, whether it is taken by steps that are seen or not."""
        if not self._rate_counts:
            self._rate_since, self._rate_counts = time.perf_counter(), True

    def round_ended(self, server_round: int):
        """Count the steps of a round that were not seen: those of clients elsewhere, or of clients that failed."""
        self.steps_done = self.total_steps - self.steps_after - (self.num_rounds - server_round) * self.steps_per_round
        self._live.update(self._task, completed=self.steps_done, eta=self.eta)

    @property
    def eta(self) -> str:
        """
        Time left, as `m:ss`, from the mean time per step so far: since the phase of the first step began, or the first round.
        What is done once, before any step, says nothing about those to come.
        """
        taken = self.steps_done - self._steps_before
        if taken == 0:
            return "--:--"
        elapsed = time.perf_counter() - self._rate_since
        return _clock(elapsed / taken * (self.total_steps - self.steps_done))

    def phase(self, server_round: int, phase: str):
        """Say what happens now. Round 0 is what comes before the first round."""
        where = f"round {server_round}/{self.num_rounds}" if server_round else "start"
        self._where, self._client = f"{where} · {phase}", ""
        self._begin()

    def client(self, name: str):
        """Say which client trains now, within the phase."""
        self._client = f" · client {name}"
        self._begin()

    def _begin(self):
        self._phase_started, self._phase_steps, self._counted, self._loss = time.perf_counter(), 0, "", ""
        if not self._rate_counts:
            self._rate_since = self._phase_started
        self._live.update(self._task, description=self._status)

    def part(self, done: int, total: int):
        """Say how far a phase without optimizer steps is."""
        self._counted = f" · {done}/{total}"
        self._live.update(self._task, description=self._status, refresh=False)

    def step(self, loss: float):
        """Count one optimizer step."""
        self._rate_counts = True
        self.steps_done += 1
        self._phase_steps += 1
        self._counted, self._loss = f" · step {self._phase_steps}", f" · loss {loss:.3f}"
        self._live.update(self._task, advance=1, description=self._status, eta=self.eta, refresh=False)

    @property
    def _status(self) -> str:
        return f"{self._where}{self._client}{self._counted}{self._loss}"

    def _speak(self):
        while not self._ended.wait(min(1.0, self.interval / 4)):
            now = time.perf_counter()
            if now - self._last_line >= self.interval:
                self.line(f"{self._status} · {_clock(now - self._phase_started)} so far | ETA {self.eta}")

    def line(self, text: str, style: str | None = None):
        """Print a line above the live display."""
        self._last_line = time.perf_counter()
        if self.enabled:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def round_line(self, record: RoundRecord):
        """Print a round's numbers."""
        width = len(str(self.num_rounds))
        parts = [f"round {record.server_round:>{width}}/{self.num_rounds}"]
        if record.alignment_l2 is not None:
            parts.append(f"align L2 {record.alignment_l2:.3f}")
        losses = record.client_losses
        if len(losses) > MAX_NAMED_CLIENTS:
            low, high = min(losses.values()), max(losses.values())
            parts.append(f"{len(losses)} clients {sum(losses.values()) / len(losses):.3f} ({low:.3f}-{high:.3f})")
        elif losses:
            parts.append("  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
        if not record.counted:
            parts.append("too few answers")
        if record.adap_emu_loss is not None:
            parts.append(f"AdapEmu {record.adap_emu_loss:.3f}  AdapFu {record.adap_fu_loss:.3f}")
        parts.append(f"{sum(record.seconds.values()):.1f} s")
        if not self.console.is_terminal:  # the live display shows it
            parts.append(f"ETA {self.eta}")
        self.line(" | ".join(parts))
        for what, reasons in (("refused the update of", record.refused), ("no answer from", record.failed)):
            for name, reason in reasons.items():
                self.line(f"  {what} client '{name}': {reason}", style="yellow")
        self._uncovered_lines(record.uncovered)

    def _uncovered_lines(self, uncovered: dict[str, str]):
        for name, reason in list(uncovered.items())[:MAX_NAMED_CLIENTS]:
            self.line(f"  the public text does not cover client '{name}': {reason}", style="yellow")
        if uncovered:
            others = len(uncovered) - MAX_NAMED_CLIENTS
            more = f"nor {others} other clients (`uncovered` in rounds.jsonl). " if others > 0 else ""
            self.line(
                f"  {more}Align on public text in their form, and longer if the emulator is far behind on public text, too",
                style="yellow",
            )


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class StepReporter(TrainerCallback):
    """Tells a [`RunProgress`] about each optimizer step of a trainer."""

    def __init__(self, progress: RunProgress, trainer: RoundTrainer, metric: str):
        self.progress, self.trainer, self.metric = progress, trainer, metric

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.step(self.trainer.step_metrics[self.metric][-1])


@contextmanager
def reported(progress: RunProgress, trainer: RoundTrainer | None, metric: str) -> Iterator[None]:
    """Tell `progress` about the steps that `trainer` takes in the block."""
    if trainer is None:
        yield
        return
    reporter = StepReporter(progress, trainer, metric)
    trainer.add_callback(reporter)
    try:
        yield
    finally:
        trainer.remove_callback(reporter)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the libraries' bars for each preparation step of each client and each file written."""
    shown = datasets.are_progress_bars_disabled() is False, transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            transformers_logging.enable_progress_bar()
