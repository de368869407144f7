"""Trackers (`report_to`) and a user's callbacks, which see a round as one step of a trainer."""

import copy
from collections.abc import Sequence
from dataclasses import fields

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import IntervalStrategy

from ..config import FedBiOTConfig
from ..shared.records import RoundRecord
from ..shared.selection import Selection


class Trackers:
    """
    Calls callbacks as a trainer does. `state.global_step` is the round, and `state.best_metric` and
    `state.best_global_step` tell the best one of those that were evaluated.

    Args:
        args ([`FedBiOTConfig`]): Names the trackers, and the metric of the best round. Callbacks see a copy in which
            rounds are evaluated steps, as they are.
        num_rounds (`int`): Rounds of the run.
        callbacks (sequence of `TrainerCallback`): A user's own.
        model, processing_class: What callbacks get under these names.
    """

    def __init__(
        self, args: FedBiOTConfig, num_rounds: int, callbacks: Sequence[TrainerCallback], model, processing_class
    ):
        self.selection = Selection.of(args)
        self.args = args = copy.copy(args)
        args.metric_for_best_model, args.greater_is_better = self.selection.metric, self.selection.greater_is_better
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, max(1, args.eval_rounds or num_rounds)
        self.state = TrainerState(
            max_steps=num_rounds,
            is_world_process_zero=args.process_index == 0,
            is_local_process_zero=args.local_process_index == 0,
        )
        trackers = [callback() for callback in get_reporting_integration_callbacks(args.report_to)]
        self.handler = CallbackHandler(
            [DefaultFlowCallback(), *trackers, *callbacks], model, processing_class, optimizer=None, lr_scheduler=None
        )
        self.control = self.handler.on_init_end(args, self.state, TrainerControl())

    @property
    def stops_run(self) -> bool:
        """Whether a callback wants the run to end."""
        return self.control.should_training_stop

    def tell(self, event: str, *values):
        """Call all callbacks' method `event`."""
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, *values)

    def at_round(self, server_round: int):
        """Count rounds as steps."""
        self.state.global_step, self.state.epoch = server_round, server_round / max(1, self.state.max_steps)

    def round_ended(self, record: RoundRecord):
        """Count a round as a step, and give its scalars to trackers and callbacks."""
        self.at_round(record.server_round)
        self.tell("on_save")
        self._report(record)
        self.tell("on_step_end")

    def _report(self, record: RoundRecord):
        drifts = [f.name for f in fields(record) if f.name.startswith("drift_")]
        logs = {
            name: getattr(record, name) for name in ("alignment_l2", "alignment_kl", *drifts, "bytes_down", "bytes_up")
        }
        for name, values in (
            ("client_loss", record.client_losses),
            ("client_zero_shot_loss", record.client_zero_shot_losses),
            ("proximal_term", record.proximal_terms),
            ("aggregation", record.aggregation),
            ("seconds", record.seconds),
        ):
            logs |= {f"{name}/{key}": value for key, value in values.items()}
        logs |= {"clients/refused": len(record.refused), "clients/failed": len(record.failed)}
        scores = record.scores()
        self._log({key: value for key, value in logs.items() if value is not None} | scores)
        self._compare(scores)

    def evaluated(self, scores: dict[str, float]):
        """Give what was measured after a round's end."""
        self._log(scores)
        self._compare(scores)

    def report_end(self, new: dict[str, float], results: dict[str, float]):
        """Give the final results to callbacks, and to trackers those of them that are new."""
        if new:
            self._log(new)
            self.tell("on_evaluate", results)

    def _log(self, scalars: dict[str, float]):
        if scalars:
            self.state.log_history.append({**scalars, "step": self.state.global_step})
            self.tell("on_log", scalars)

    def _compare(self, scores: dict[str, float]):
        if scores:
            self.tell("on_evaluate", scores)
        value = scores.get(self.selection.metric)
        if value is not None and self.selection.improves(value, self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def go_on(self, records: Sequence[RoundRecord]):
        """Be where the run was after these rounds. Callbacks that keep a state, as for early stopping, are told of them."""
        everyone = self.handler.callbacks
        self.handler.callbacks = [callback for callback in everyone if isinstance(callback, ExportableState)]
        try:
            for record in records:
                self.tell("on_step_begin")
                self.round_ended(record)
        finally:
            self.handler.callbacks = everyone
