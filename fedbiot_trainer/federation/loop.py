"""The round loop. It knows neither where clients are, nor what is shown, nor where files go."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.coverage import EMULATOR_LOSS, PublicLoss, why_uncovered
from ..evaluation.drift import Drift
from ..evaluation.evaluator import Evaluator
from ..server.server import FederatedServer
from ..shared.records import RoundRecord
from ..shared.selection import Selection
from ..wire.messages import PayloadError
from .interruption import Interruption, RunInterrupted
from .observer import Observer
from .participation import Participation
from .pool import ClientPool, Reply
from .state import BestRound, FederationState


MAX_VOID_ROUNDS = 3  # in a row, with too few answers; more of them and something is wrong with all clients


@dataclass(frozen=True)
class Schedule:
    """
    How much a run does, and when.

    Attributes:
        num_rounds (`int`): Rounds.
        initial_alignment_steps, alignment_steps (`int`): Steps before the first round, and at the start of each.
        eval_rounds (`int`): Evaluate every this many rounds, and after the last. 0: only then.
        client_timeout (`float`, *optional*): Seconds that a client has for a round.
        client_retries (`int`): How often a client that failed is asked again in the same round.
    """

    num_rounds: int
    initial_alignment_steps: int
    alignment_steps: int
    eval_rounds: int = 1
    client_timeout: float | None = None
    client_retries: int = 0

    def evaluates_after(self, server_round: int) -> bool:
        """Whether AdapEmu and AdapFu are evaluated after a round."""
        due = self.eval_rounds > 0 and server_round % self.eval_rounds == 0
        return due or server_round == self.num_rounds


@dataclass
class RoundLoop:
    """
    Runs FedBiOT: initial alignment, then in each round align, broadcast, local training, aggregate, evaluate.

    Args:
        server ([`FederatedServer`]): The model owner.
        pool ([`ClientPool`]): Brings the clients' answers.
        participation ([`Participation`]): Who is asked, and whether enough answered.
        schedule ([`Schedule`]): How much to do.
        interruption ([`Interruption`]): Asked between the parts of a round whether to stop.
        observers (sequence of [`Observer`], *optional*): Told what happens, in this order.
        evaluator ([`Evaluator`], *optional*): Measures AdapEmu and AdapFu.
        drift ([`Drift`], *optional*): Measures the emulator's distance from the full model with each evaluation.
        public_loss ([`PublicLoss`], *optional*): Measures what clients' text is compared with, once.
        settings (`dict`, *optional*): Kept in each state, to compare with when a run is resumed.
        selection ([`Selection`], *optional*): Which round is `best`, whose LoRAs are to be kept.
    """

    server: FederatedServer
    pool: ClientPool
    participation: Participation
    schedule: Schedule
    interruption: Interruption
    observers: Sequence[Observer] = ()
    evaluator: Evaluator | None = None
    drift: Drift | None = None
    public_loss: PublicLoss | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    selection: Selection | None = None
    best: BestRound | None = field(default=None, init=False)
    records: list[RoundRecord] = field(default_factory=list, init=False)
    initial_alignment: dict[str, float] = field(default_factory=dict, init=False)
    _open: RoundRecord | None = field(default=None, init=False)

    @property
    def server_round(self) -> int:
        """Rounds that have ended."""
        return self.records[-1].server_round if self.records else 0

    def run(self, state: FederationState | None = None):
        """
        Run all rounds that are left.

        Args:
            state ([`FederationState`], *optional*): Where an earlier run was.

        Raises:
            RuntimeError: If too few clients answered in several rounds in a row.
            RunInterrupted: If the run is told to stop.
        """
        self._tell("on_phase", 0, "starting")
        for measures in (self.evaluator, self.drift, self.public_loss):
            if measures is not None:
                measures.on_progress = self._progress
        try:
            if state is None:
                self._start()
            else:
                self._restore(state)
                self._prepare_teacher()
                if self.server_round == 0 and self._open is None:
                    self._measure_public()  # where it was interrupted
            while self.server_round < self.schedule.num_rounds and not any(o.stops_run for o in self.observers):
                self._round()
            self._evaluate_last()
        except RunInterrupted:
            if self.initial_alignment:
                self._tell("on_interruption", self._state())
            raise

    def _start(self):
        """What comes before the first round: the zero-shot evaluation and the initial alignment."""
        if self.evaluator is not None:
            self._tell("on_phase", 0, "evaluating the full model")
            self.evaluator.zero_shot()
        self._prepare_teacher()
        seconds: dict[str, float] = {}
        self._tell("on_phase", 0, "closed form of the emulator LoRA")
        with timed(seconds, "closed_form_seconds"):
            start = self.server.initialize_alignment(self._progress)
        start |= seconds if start else {}
        self._tell("on_phase", 0, "initial alignment")
        with timed(seconds, "seconds"):
            metrics = self.server.align(self.schedule.initial_alignment_steps)
        self.initial_alignment = start | metrics | {"seconds": seconds["seconds"]}
        self._measure_public()
        self._tell("on_initial_alignment", self.initial_alignment)
        self._tell("on_state", self._state())

    def _measure_public(self):
        """What clients' text is compared with, unless that is known."""
        if self.public_loss is not None and EMULATOR_LOSS not in self.initial_alignment:
            self._tell("on_phase", 0, "losses on public text")
            self.server.install_loras()
            self.initial_alignment = self.initial_alignment | self.public_loss.measure()

    def _prepare_teacher(self):
        if self.server.trainer is not None:
            self._tell("on_phase", self.server_round, "hidden states of the public text")
            self.server.trainer.prepare_teacher(self._progress)

    def _round(self):
        server_round = self.server_round + 1
        self._tell("on_round_begin", server_round)
        record = self._open = self._open or self._open_round(server_round)
        if record.counted is None:
            self._ask(record)
            self._close_round(record)
        # An interruption here finds the round closed, and a resumed run begins with its evaluation.
        self._evaluate(record, self.schedule.evaluates_after(server_round))
        self.records.append(record)
        self._open = None
        self._tell("on_state", self._state())
        self._tell("on_round_end", record)
        self._check_answers()
        self.interruption.check()

    def _open_round(self, server_round: int) -> RoundRecord:
        """The server's part: its alignment, and an average without updates."""
        record = RoundRecord(server_round)
        with timed(record.seconds, "align"):
            self._tell("on_phase", server_round, "alignment")
            metrics = self.server.align(self.schedule.alignment_steps)
        record.alignment_l2, record.alignment_kl = metrics.get("alignment_l2"), metrics.get("alignment_kl")
        self.server.begin_round()
        return record

    def _ask(self, record: RoundRecord):
        """Have the clients of a round train, those that answered before a resume excepted."""
        drawn = self.participation.draw(self.pool.names(), record.server_round)
        waiting = [name for name in drawn if name not in record.answered]
        for attempt in range(1 + self.schedule.client_retries):
            self._tell("on_phase", record.server_round, "local training" if attempt == 0 else "asking again")
            with timed(record.seconds, "broadcast"):
                starts = self.server.start_round(record.server_round, waiting)
            last, again = attempt == self.schedule.client_retries, []
            for reply in self._timed_replies(self.pool.fit(starts, self.schedule.client_timeout), record):
                record.bytes_down += starts.size(reply.client)
                if reply.error is not None and not last:
                    again.append(reply.client)
                    continue
                self._take(reply, record)
                self._tell("on_state", self._state())
                self.interruption.check()
            waiting = again
            if not waiting:
                break

    def _timed_replies(self, replies: Iterator[Reply], record: RoundRecord) -> Iterator[Reply]:
        while True:
            with timed(record.seconds, "local_training"):
                reply = next(replies, None)
            if reply is None:
                return
            yield reply

    def _take(self, reply: Reply, record: RoundRecord):
        """Put a reply into the average, or note why not."""
        name = reply.client
        if reply.payload is None:
            record.failed[name] = reply.error or "it did not answer"
            return
        with timed(record.seconds, "aggregate"):
            record.bytes_up += len(reply.payload)
            try:
                metrics = self.server.receive(record.server_round, name, reply.payload)
            except PayloadError as error:
                record.refused[name] = str(error)
                return
        record.client_losses[name] = metrics["loss"]
        record.proximal_terms[name] = metrics.get("proximal_term")
        self._note_coverage(name, metrics.get("zero_shot_loss"), record)

    def _note_coverage(self, name: str, zero_shot: float | None, record: RoundRecord):
        """Once for each client: it measures again where its first round did not count."""
        if zero_shot is None or any(name in earlier.client_zero_shot_losses for earlier in self.records):
            return
        record.client_zero_shot_losses[name] = zero_shot
        held_out = None if self.evaluator is None else self.evaluator.zero_shot()["loss"]
        why = why_uncovered(zero_shot, self.initial_alignment, held_out)
        if why is not None:
            record.uncovered[name] = why

    def _close_round(self, record: RoundRecord):
        with timed(record.seconds, "aggregate"):
            # Too few answers are no ground to move the LoRA: the round passes, and leaves it as it is.
            record.counted = self.participation.enough(len(record.client_losses))
            if record.counted:
                aggregate = self.server.aggregate()
                record.weights, record.aggregation = aggregate.weights, aggregate.metrics
            else:
                self.server.discard_round()

    def _evaluate_last(self):
        """Evaluate the last round, where an observer has ended the run between two evaluations."""
        record = self.records[-1] if self.records else None
        if record is not None and self._measures and record.adap_fu_loss is record.drift_l2 is None:
            self._evaluate(record, True)
            self._tell("on_state", self._state())
            self._tell("on_late_evaluation", record)

    @property
    def _measures(self) -> bool:
        return self.evaluator is not None or self.drift is not None

    def _evaluate(self, record: RoundRecord, due: bool):
        if self.evaluator is not None:
            record.zero_shot_loss = self.evaluator.zero_shot()["loss"]
        if not due or not self._measures:
            return
        self._tell("on_phase", record.server_round, "evaluating")
        with timed(record.seconds, "evaluate"):
            self.server.install_loras()
            for who, scores in self.evaluator.adapted().items() if self.evaluator is not None else ():
                setattr(record, f"{who}_loss", scores["loss"])
                setattr(record, f"{who}_token_accuracy", scores["token_accuracy"])
                by_set = {name: value for name, value in scores.items() if name not in ("loss", "token_accuracy")}
                if by_set:
                    record.evaluations[who] = by_set
            for name, value in self.drift.measure().items() if self.drift is not None else ():
                setattr(record, name, value)
        self._keep_best(record)

    def _keep_best(self, record: RoundRecord):
        if self.selection is None:
            return
        value = record.scores().get(self.selection.metric)
        if value is not None and self.selection.improves(value, self.best.metric if self.best else None):
            loras = self.server.client_lora, self.server.emulator_lora
            copies = ({key: tensor.clone() for key, tensor in lora.items()} for lora in loras)
            self.best = BestRound(record.server_round, value, *copies)

    def _check_answers(self):
        last = self.records[-MAX_VOID_ROUNDS:]
        if len(last) == MAX_VOID_ROUNDS and not any(record.counted for record in last):
            reasons = {**last[-1].failed, **last[-1].refused}
            raise RuntimeError(
                f"In {MAX_VOID_ROUNDS} rounds in a row, fewer than {self.participation.least} clients "
                f"(`min_train_clients`) sent a valid update, so there was nothing to average. In the last one: {reasons}. "
                "The state is kept: mend it and resume."
            )

    def _state(self) -> FederationState:
        server = self.server
        return FederationState(
            server_round=self.server_round,
            client_lora=server.client_lora,
            emulator_lora=server.emulator_lora,
            aggregator=server.aggregator.state_dict(),
            alignment_steps=server.alignment_steps,
            client_steps=server.client_steps,
            num_examples=server.num_examples,
            settings=self.settings,
            initial_alignment=self.initial_alignment,
            zero_shot=self.evaluator.zero_shot() if self.evaluator is not None else None,
            held_out=self.evaluator.digest if self.evaluator is not None else None,
            records=self.records,
            open_round=self._open,
            best=self.best,
        )

    def _restore(self, state: FederationState):
        server = self.server
        server.client_lora, server.emulator_lora = state.client_lora, state.emulator_lora
        server.alignment_steps, server.client_steps = state.alignment_steps, dict(state.client_steps)
        self.records, self.initial_alignment = list(state.records), state.initial_alignment
        self._open, self.best = state.open_round, state.best if self.selection is not None else None
        server.num_examples = dict(state.num_examples)
        if self._open is not None:
            server.begin_round(received=self._open.client_losses)
        server.aggregator.load_state_dict(state.aggregator)
        if self.evaluator is not None:
            self.evaluator.remember_zero_shot(state.zero_shot)

    def _progress(self, done: int, total: int):
        self._tell("on_progress", done, total)
        self.interruption.check()

    def _tell(self, event: str, *values):
        for observer in self.observers:
            getattr(observer, event)(*values)


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the wall time of the block to `seconds[phase]`."""
    started = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started
