"""What a run measures on public text besides aligning on it."""

import numpy as np

from ..client.trainer import ClientSFTTrainer
from ..config import FedBiOTConfig
from ..evaluation.coverage import PublicLoss
from ..evaluation.drift import Drift
from ..evaluation.evaluator import Evaluator
from ..server.server import FederatedServer
from ..shared.texts import draw_texts
from .run_texts import RunTexts


NAME = "`public_dataset`"


def public_measures(
    args: FedBiOTConfig,
    server: FederatedServer,
    trainer: ClientSFTTrainer,
    evaluator: Evaluator | None,
    texts: RunTexts,
) -> tuple[Drift | None, PublicLoss | None]:
    """
    What measures the emulator's distance from the full model, with `args.eval_drift`, and the losses that the clients' are
    compared with, if they report any: on the public text that is held out, else on some that is aligned on.

    Args:
        args ([`FedBiOTConfig`]): Configuration.
        server ([`FederatedServer`]): Has the models, and a trainer if there is an alignment.
        trainer ([`ClientSFTTrainer`]): Tokenizes public text as clients would be trained on it.
        evaluator ([`Evaluator`], *optional*): Has the evaluation set.
        texts ([`RunTexts`]): The public text.
    """
    held_out, number = None, args.client_zero_shot_examples
    if texts.public_eval is not None:
        held_out = trainer.with_labels(texts.public_eval, NAME)
    drift = public_loss = None
    if args.eval_drift:
        measured = {"drift": evaluator.tokens if evaluator is not None else None, "drift_public": held_out}
        drift = Drift(server.models, trainer, {name: text for name, text in measured.items() if text})
    if server.trainer is not None and texts.public is not None and number > 0:
        some = held_out
        if some is None:
            rows = np.random.default_rng(args.seed).permutation(len(texts.public))[:number]
            some = trainer.with_labels(texts.public.select(rows), NAME)
        if len(some) > 0:
            public_loss = PublicLoss(server.models, trainer, draw_texts(some, number, args.seed))
    return drift, public_loss
