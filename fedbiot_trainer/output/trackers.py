"""Trackers (`report_to`) and a user's callbacks, which see a round as one step of a trainer."""

from collections.abc import Sequence

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from ..shared.records import RoundRecord


class Trackers:
    """
    Calls callbacks as a trainer does. `state.global_step` is the round.

    Args:
        args (`TrainingArguments`): Names the trackers.
        num_rounds (`int`): Rounds of the run.
        callbacks (sequence of `TrainerCallback`): A user's own.
        model, processing_class: What callbacks get under these names.
    """

    def __init__(
        self, args: TrainingArguments, num_rounds: int, callbacks: Sequence[TrainerCallback], model, processing_class
    ):
        self.args = args
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

    def report(self, record: RoundRecord):
        """Give a round's scalars to trackers and callbacks."""
        logs = {
            name: getattr(record, name)
            for name in ("alignment_l2", "alignment_kl", "drift_l2", "drift_kl", "bytes_down", "bytes_up")
        }
        for name, values in (
            ("client_loss", record.client_losses),
            ("proximal_term", record.proximal_terms),
            ("aggregation", record.aggregation),
            ("seconds", record.seconds),
        ):
            logs |= {f"{name}/{key}": value for key, value in values.items()}
        logs |= {"clients/refused": len(record.refused), "clients/failed": len(record.failed)}
        scores = (
            "zero_shot_loss",
            "adap_emu_loss",
            "adap_fu_loss",
            "adap_emu_token_accuracy",
            "adap_fu_token_accuracy",
        )
        by_set = {f"{who}_{name}": value for who, found in record.evaluations.items() for name, value in found.items()}
        self.log({name: getattr(record, name) for name in scores} | by_set, **logs)

    def log(self, evaluated: dict[str, float | None], **logs: float | None):
        """Log scalars; those in `evaluated` as results of an evaluation."""
        metrics = {f"eval_{key}": value for key, value in evaluated.items() if value is not None}
        scalars = {key: value for key, value in logs.items() if value is not None} | metrics
        if scalars:
            self.state.log_history.append({**scalars, "step": self.state.global_step})
            self.tell("on_log", scalars)
        if metrics:
            self.tell("on_evaluate", metrics)
