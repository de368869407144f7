"""How strongly the client LoRA is plugged in to the full model."""

from collections.abc import Sequence

from ..evaluation.evaluator import Evaluator
from ..server.server import FederatedServer
from ..shared.records import PlugIn
from ..shared.selection import ADAP_FU, Selection


def choose_scale(
    server: FederatedServer, evaluator: Evaluator, scales: Sequence[float], selection: Selection
) -> PlugIn:
    """
    Let the server plug the client LoRA in at the strength at which AdapFu is best on held-out text.

    What clients trained is right for their emulator. In the full model, less of it is better where the two are far apart.
    Each strength costs an evaluation of AdapFu.

    Args:
        server ([`FederatedServer`]): Its `plug_in_scale` is set.
        evaluator ([`Evaluator`]): Has the held-out text.
        scales (sequence of `float`): What to try. Of equals, the first is taken; where nothing gives a number, 1.
        selection ([`Selection`]): What to choose by, of AdapFu.
    """
    chosen, best, values = 1.0, None, {}
    for scale in scales:
        server.plug_in_scale = scale
        server.install_loras()
        value = values[f"{scale:g}"] = evaluator.adap_fu()[selection.metric.removeprefix(ADAP_FU)]
        if selection.improves(value, best):
            chosen, best = scale, value
    server.plug_in_scale = chosen
    return PlugIn(chosen, selection.metric, values)
