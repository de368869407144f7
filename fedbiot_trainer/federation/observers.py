"""What follows a run: its state and files on disk, its progress on the screen, its scalars to trackers."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from ..config import FedBiOTConfig
from ..evaluation.coverage import EMULATOR_LOSS, FULL_LOSS
from ..output.progress import RunProgress, no_progress_bars
from ..output.run_folder import RunFolder
from ..output.trackers import Trackers
from ..server.server import FederatedServer
from ..shared.processes import is_main_process
from ..shared.records import RoundRecord, RunSummary
from ..wire.plan import TrainingPlan
from .observer import Observer
from .state import FederationState


logger = logging.get_logger(__name__)

PATIENCE = 3  # evaluated rounds
ADVICE = (
    "Try fewer `local_steps` in more rounds, a lower `learning_rate`, public text that is nearer to the clients', or "
    "`plug_in_scales`, which plugs in less of the client LoRA if that is better."
)


class KeepState(Observer):
    """
    Puts the state of the federation on disk, before anything else is told of a round.

    Args:
        folder (`Path`): Folder for states alone.
        keep (`int`): How many of the newest to keep.
        after_clients (`bool`): Whether to write one after each client, not only after each round.
    """

    def __init__(self, folder: Path, keep: int, after_clients: bool):
        self.folder, self.keep, self.after_clients = folder, keep, after_clients

    def on_state(self, state: FederationState):
        if is_main_process() and (state.open_round is None or self.after_clients):
            state.save(self.folder, self.keep)

    def on_interruption(self, state: FederationState):
        if is_main_process():
            state.save(self.folder, self.keep)


class WriteFiles(Observer):
    """Writes `rounds.jsonl` and both LoRAs after each round."""

    def __init__(self, folder: RunFolder, server: FederatedServer):
        self.folder, self.server = folder, server

    def on_round_end(self, record: RoundRecord):
        self.save_loras()
        self.folder.add_record(record)

    def on_late_evaluation(self, record: RoundRecord):
        self.folder.set_records([*RoundRecord.read_all(self.folder.rounds)[:-1], record])

    def save_package(self, args: FedBiOTConfig, completion_only_loss: bool) -> int:
        """
        Write what clients get, and the result's tokenizer. Which tokens count is the same for all of them, whatever form their
        text has. Returns the package's bytes.
        """
        with no_progress_bars():
            TrainingPlan.of(args, completion_only_loss).save(self.folder.package)
            num_bytes = self.server.package().save(self.folder.package, self.server.processing_class)
        if is_main_process():
            self.server.save_tokenizer(self.folder.client_lora)
        return num_bytes

    def save_loras(self):
        """Write the client LoRA for the full model, and both LoRAs into the emulator package."""
        if is_main_process():
            self.server.package().save_loras(self.folder.package)
            self.server.save_client_lora(self.folder.client_lora, self.folder.model_name)

    def save_result(self, folder: str | Path, summary: RunSummary | None):
        """Write the client LoRA for the full model, its tokenizer and model card into a folder of their own."""
        if is_main_process():
            self.server.save_client_lora(folder, self.folder.model_name)
            self.server.save_tokenizer(folder)
            self.folder.save_card(folder, summary)


class WarnOfNoGain(Observer):
    """
    Warns once if AdapFu's loss is worse than zero-shot's, or than in its best round, in several evaluated rounds in a row.

    Args:
        records (sequence of [`RoundRecord`]): Rounds before a resume.
        keeps_best_round (`bool`): Whether the run ends with its best round anyway.
    """

    def __init__(self, records: Sequence[RoundRecord], keeps_best_round: bool):
        self.keeps_best_round = keeps_best_round
        self.worse_than_zero_shot = self.worse_than_best = 0
        self.best_round, self.best_loss = 0, math.inf
        self.warned = False
        for record in records:
            self._count(record)

    def _count(self, record):
        loss = record.adap_fu_loss
        if loss is None:
            return
        self.worse_than_zero_shot = self.worse_than_zero_shot + 1 if loss > record.zero_shot_loss else 0
        if loss <= self.best_loss:
            self.best_round, self.best_loss, self.worse_than_best = record.server_round, loss, 0
        else:
            self.worse_than_best += 1

    def _result(self) -> str:
        if self.keeps_best_round:
            return "The run ends with its best round all the same (`load_best_model_at_end`)."
        return "The run ends with its last round: `load_best_model_at_end=True` would keep the best."

    def on_round_end(self, record: RoundRecord):
        self._count(record)
        if self.warned or not is_main_process() or record.adap_fu_loss is None:
            return
        if self.worse_than_zero_shot >= PATIENCE:
            than = f"the full model's without it ({record.zero_shot_loss:.4f})"
        elif self.worse_than_best >= PATIENCE:
            than = f"after round {self.best_round} ({self.best_loss:.4f})"
        else:
            return
        self.warned = True
        logger.warning(
            f"AdapFu's loss on held-out text ({record.adap_fu_loss:.4f}) has been worse than {than} for {PATIENCE} evaluated "
            f"rounds in a row. {ADVICE} {self._result()}"
        )


class CallCallbacks(Observer):
    """Tells trackers and a user's callbacks, for whom a round is a step."""

    def __init__(self, trackers: Trackers):
        self.trackers = trackers

    @property
    def stops_run(self) -> bool:
        return self.trackers.stops_run

    def on_round_begin(self, server_round: int):
        self.trackers.tell("on_step_begin")

    def on_round_end(self, record: RoundRecord):
        self.trackers.round_ended(record)

    def on_late_evaluation(self, record: RoundRecord):
        self.trackers.evaluated(record.scores())


class ShowProgress(Observer):
    """Shows where the run is, and a line for each round."""

    def __init__(self, progress: RunProgress):
        self.progress = progress

    def on_phase(self, server_round: int, phase: str):
        self.progress.phase(server_round, phase)

    def on_round_begin(self, server_round: int):
        self.progress.round_began()

    def on_progress(self, done: int, total: int):
        self.progress.part(done, total)

    def on_initial_alignment(self, metrics: dict[str, float]):
        if "closed_form_l2" in metrics:
            l2, tokens, seconds = (metrics[f"closed_form_{name}"] for name in ("l2", "tokens", "seconds"))
            self.progress.line(f"closed form | L2 {l2:.4f} on {tokens:,.0f} public tokens | {seconds:.1f} s")
        values = [f"{name} {metrics[name]:.4f}" for name in ("alignment_l2", "alignment_kl") if name in metrics]
        if values:
            self.progress.line(f"initial alignment | {'  '.join(values)} | {metrics['seconds']:.1f} s")
        if EMULATOR_LOSS in metrics:
            emulator, full = metrics[EMULATOR_LOSS], metrics[FULL_LOSS]
            self.progress.line(f"loss on public text | emulator {emulator:.3f}  full model {full:.3f}")

    def on_round_end(self, record: RoundRecord):
        self.progress.round_ended(record.server_round)
        self.progress.round_line(record)

    def on_late_evaluation(self, record: RoundRecord):
        self.progress.round_line(record)


def run_progress(
    args: FedBiOTConfig, num_asked: int, aligns: bool, console: Console, state: FederationState | None
) -> RunProgress:
    """
    The progress of a run, as far as an earlier one brought it.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        num_asked (`int`): Clients in a round.
        aligns (`bool`): Whether there is an alignment.
        console (`rich.console.Console`): Where to show it, in the main process.
        state ([`FederationState`], *optional*): Where an earlier run was.
    """
    initial, per_round, after = 0, num_asked * args.local_steps, 0
    if aligns:
        initial, per_round, after = args.initial_alignment_steps, per_round + args.alignment_steps, args.plug_in_steps
    total = initial + args.num_rounds * per_round + after
    progress = RunProgress(total, args.num_rounds, per_round, console, args.process_index == 0, steps_after=after)
    if state is not None:
        progress.skip(initial + state.server_round * per_round)
    return progress
