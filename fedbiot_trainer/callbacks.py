"""What is shown while a run goes on: one live display in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from .trainer import RoundTrainer


MAX_NAMED_CLIENTS = 4  # more are summed up in a round's line


class RunProgress:
    """
    Progress of a federated run, counted in optimizer steps.

    Args:
        total_steps (`int`): Alignment and local steps of the whole run.
        num_rounds (`int`): Rounds of the run.
        console (`rich.console.Console`): Where to print. Live only if it is a terminal.
        enabled (`bool`, *optional*, defaults to `True`): Whether to print anything.
    """

    def __init__(self, total_steps: int, num_rounds: int, console: Console, enabled: bool = True):
        self.console, self.num_rounds, self.enabled = console, num_rounds, enabled
        self.total_steps, self.steps_done = total_steps, 0
        self.started = time.perf_counter()
        self._where = ""
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
        self.started = time.perf_counter()
        self._live.start()
        return self

    def __exit__(self, *exception):
        self._live.stop()

    @property
    def eta(self) -> str:
        """Time left, as `m:ss`, from the mean time per step so far."""
        if self.steps_done == 0:
            return "--:--"
        elapsed = time.perf_counter() - self.started
        seconds = round(elapsed / self.steps_done * (self.total_steps - self.steps_done))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"

    def phase(self, server_round: int, phase: str):
        """Say what happens now. Round 0 is what comes before the first round."""
        where = f"round {server_round}/{self.num_rounds}" if server_round else "start"
        self._where = f"{where} · {phase}"
        self._live.update(self._task, description=self._where)

    def step(self, loss: float):
        """Count one optimizer step."""
        self.steps_done += 1
        self._live.update(
            self._task, advance=1, description=f"{self._where} · loss {loss:.3f}", eta=self.eta, refresh=False
        )

    def line(self, text: str, style: str | None = None):
        """Print a line above the live display."""
        if self.enabled:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def round_line(self, record: dict):
        """Print a round's numbers."""
        width = len(str(self.num_rounds))
        parts = [f"round {record['server_round']:>{width}}/{self.num_rounds}"]
        if record["alignment_l2"] is not None:
            parts.append(f"align L2 {record['alignment_l2']:.3f}")
        losses = record["client_losses"]
        if len(losses) > MAX_NAMED_CLIENTS:
            low, high = min(losses.values()), max(losses.values())
            parts.append(f"{len(losses)} clients {sum(losses.values()) / len(losses):.3f} ({low:.3f}-{high:.3f})")
        else:
            parts.append("  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
        if record["adap_emu_loss"] is not None:
            parts.append(f"AdapEmu {record['adap_emu_loss']:.3f}  AdapFu {record['adap_fu_loss']:.3f}")
        parts.append(f"{sum(record['seconds'].values()):.1f} s")
        if not self.console.is_terminal:  # the live display shows it
            parts.append(f"ETA {self.eta}")
        self.line(" | ".join(parts))
        for name, reason in record["refused"].items():
            self.line(f"  refused the update of client '{name}': {reason}", style="yellow")


class StepReporter(TrainerCallback):
    """Tells a [`RunProgress`] about each optimizer step of a trainer."""

    def __init__(self, progress: RunProgress, trainer: RoundTrainer, metric: str):
        self.progress, self.trainer, self.metric = progress, trainer, metric

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.step(self.trainer.step_metrics[self.metric][-1])


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[phase]`."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


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
