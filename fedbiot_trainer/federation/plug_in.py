"""How the client LoRA is plugged in to the full model: what it learns there, and how strong it is."""

from collections.abc import Sequence
from statistics import mean

from transformers.utils import logging

from ..config import FedBiOTConfig
from ..evaluation.evaluator import Evaluator
from ..server.server import FederatedServer
from ..shared.records import PlugIn, PlugInLearning
from ..shared.round_trainer import DivergenceError
from ..shared.selection import ADAP_FU, Selection


logger = logging.get_logger(__name__)


def plug_in(
    server: FederatedServer, evaluator: Evaluator | None, args: FedBiOTConfig, selection: Selection
) -> tuple[PlugInLearning | None, PlugIn | None]:
    """Do what `plug_in_steps` and `plug_in_scales` ask for. Returns what came of each, if it does."""
    learning = learn(server, evaluator, selection) if args.plug_in_steps > 0 else None
    if evaluator is None or args.plug_in_scales is None:
        return learning, None
    return learning, choose_scale(server, evaluator, args.plug_in_scales, selection)


def learn(server: FederatedServer, evaluator: Evaluator | None, selection: Selection) -> PlugInLearning | None:
    """
    Let the server's client LoRA learn in the full model what it does in the emulator ([`FederatedServer.learn_plug_in`]).
    With held-out text, what was learned is kept only if AdapFu is better with it, which costs up to two evaluations of AdapFu.

    Args:
        server ([`FederatedServer`]): Its `plug_in_lora` is set.
        evaluator ([`Evaluator`], *optional*): Has the held-out text.
        selection ([`Selection`]): What to choose by. AdapFu's loss, if that is no metric of AdapFu.

    Returns:
        [`PlugInLearning`], *optional*: `None` if no layer is dropped, so that there is nothing to learn, or if the LoRA does
            not stay finite. It is plugged in as clients left it then.
    """
    if server.plug_in_trainer is None:
        return None
    if not selection.metric.startswith(ADAP_FU):
        selection = Selection()

    def score() -> float | None:
        server.install_loras()
        return None if evaluator is None else evaluator.adap_fu()[selection.metric.removeprefix(ADAP_FU)]

    before = score()
    try:
        divergences = server.learn_plug_in()
    except DivergenceError as error:
        logger.warning(f"The client LoRA is plugged in as clients left it: {error}")
        server.install_loras()
        return None
    after = score()
    kept = before is None or after is None or selection.improves(after, before)
    if not kept:
        server.plug_in_lora = None
        server.install_loras()
    metric = None if evaluator is None else selection.metric
    return PlugInLearning(len(divergences), divergences[0], mean(divergences[-10:]), kept, metric, before, after)


def choose_scale(
    server: FederatedServer, evaluator: Evaluator, scales: Sequence[float], selection: Selection
) -> PlugIn:
    """
    Let the server plug the client LoRA in at the strength at which AdapFu is best on held-out text.

    What clients trained is right for their emulator. In the full model, less of it is better where the two are far apart.
    Each strength that was not evaluated yet costs an evaluation of AdapFu.

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
