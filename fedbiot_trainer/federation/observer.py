"""What the round loop tells, and to whom."""

from ..shared.records import RoundRecord
from .state import FederationState


class Observer:
    """What follows a run: shows it, keeps it, sends it somewhere. All processes have the same observers."""

    @property
    def stops_run(self) -> bool:
        """Whether the run is to end after this round."""
        return False

    def on_phase(self, server_round: int, phase: str):
        """Something begins. Round 0 is what comes before the first round."""

    def on_progress(self, done: int, total: int):
        """Part of a phase without optimizer steps is done."""

    def on_initial_alignment(self, metrics: dict[str, float]):
        """The alignment before the first round has ended, with its last metrics and `seconds`."""

    def on_round_begin(self, server_round: int):
        """A round begins, or goes on after a resume."""

    def on_state(self, state: FederationState):
        """There is a state that a run could go on from: after the initial alignment and after each client and round."""

    def on_interruption(self, state: FederationState):
        """The run is told to stop, and will go on from this state."""

    def on_round_end(self, record: RoundRecord):
        """A round has ended, and `on_state` was called."""

    def on_late_evaluation(self, record: RoundRecord):
        """An observer has made a round the last one, so that it was evaluated after its end."""
