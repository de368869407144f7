"""
What a round costs beyond the training steps: payloads, and what surrounds a client's steps.

The first row takes rounds at the sizes of a small real run: the share of a round that goes into encoding, decoding and
checking payloads. The others take `FederatedClient.fit` apart: all of it, less the calls of `training_step` (forward and backward). All is CPU time.

    python benchmarks/round_overhead.py --json round_overhead.json
"""

import statistics
import tempfile
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from common import StepClock, parser, random_llama, show, spread, timed, token_dataset, word_tokenizer
from peft import LoraConfig

from fedbiot_trainer import ClientUpdate, FedBiOTConfig, FederatedRunner, RoundStart
from fedbiot_trainer.shared.round_trainer import frozen_garbage
from fedbiot_trainer.wire.messages import RoundStarts


# hidden_size, num_layers, vocab_size, intermediate_size
SMALL = {"model": (256, 12, 4096, 688), "num_tokens": 150, "num_clients": 3, "local_steps": 30, "alignment_steps": 10}
LARGER = {"model": (512, 8, 4096), "num_tokens": 128, "num_clients": 1, "local_steps": 30, "alignment_steps": 0}
TOY = {"model": (32, 4, 512), "num_tokens": 32, "num_clients": 1, "local_steps": 30, "alignment_steps": 0}


@contextmanager
def federation(sizes: dict):
    """A `FederatedRunner` before its first round, with garbage collection as in its `train()`."""
    vocab_size, num_tokens = sizes["model"][2], sizes["num_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        config = FedBiOTConfig(
            folder,
            num_rounds=1000,
            local_steps=sizes["local_steps"],
            initial_alignment_steps=0,
            alignment_steps=sizes["alignment_steps"],
            per_device_train_batch_size=4,
            report_to="none",
        )
        runner = FederatedRunner(
            random_llama(*sizes["model"]),
            config,
            {f"client-{i}": token_dataset(200, num_tokens, vocab_size, i) for i in range(sizes["num_clients"])},
            public_dataset=token_dataset(200, num_tokens, vocab_size),
            processing_class=word_tokenizer(vocab_size),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        with frozen_garbage():
            yield runner


def run_round(runner: FederatedRunner, server_round: int):
    """One round without evaluation and files: align, broadcast, local training, aggregate."""
    server = runner.server
    server.align(runner.args.alignment_steps)
    server.begin_round()
    starts = server.start_round(server_round, list(runner.clients))
    for name, client in runner.clients.items():
        server.receive(server_round, name, client.fit(starts[name]))
    server.aggregate()


@contextmanager
def payload_clock(seconds: list[float]):
    """Time everything that is done with a payload: encoding, decoding, checking."""
    with ExitStack() as stack:
        for payload, encode in ((RoundStarts, "__init__"), (RoundStarts, "__getitem__"), (ClientUpdate, "to_bytes")):
            clocked = timed(seconds, getattr(payload, encode))
            stack.enter_context(patch.object(payload, encode, lambda *args, clocked=clocked: clocked(*args)))
        for payload in (RoundStart, ClientUpdate):
            stack.enter_context(patch.object(payload, "from_bytes", timed(seconds, payload.from_bytes)))
        yield


def measure_wire(sizes: dict, rounds: int) -> dict:
    """Whole rounds, and the time inside the payload functions of each."""
    seconds: list[float] = []
    payloads: list[float] = []
    with federation(sizes) as runner:
        run_round(runner, 1)
        for index in range(rounds):
            inside: list[float] = []
            with payload_clock(inside):
                timed(seconds, run_round)(runner, index + 2)
            payloads.append(sum(inside))
    shares = [part / whole for part, whole in zip(payloads, seconds, strict=True)]
    return row("payloads / round", sizes, shares, 0.02, seconds, payloads)


def measure_fit(sizes: dict, rounds: int, share_target: float | None = None, ms_target: float | None = None) -> dict:
    """`fit()` of one client less its calls of `training_step`, as a share of `fit()` or in milliseconds."""
    totals, outside, around = [], [], []
    with federation(sizes) as runner:
        clock, inside = StepClock(), []
        runner.trainer.add_callback(clock)
        runner.trainer.training_step = timed(inside, runner.trainer.training_step)
        for server_round in range(rounds + 1):
            start = runner.server.start_round(server_round + 1, ["client-0"])["client-0"]
            inside.clear()
            clock.seconds.clear()
            timed(totals, runner.clients["client-0"].fit)(start)
            outside.append(totals[-1] - sum(inside))
            around.append(totals[-1] - sum(clock.seconds))
    totals, outside, around = totals[1:], outside[1:], around[1:]  # the first warms up
    if share_target is not None:
        values = [one / total for one, total in zip(outside, totals, strict=True)]
        return row("fit less steps / fit", sizes, values, share_target, totals, outside, around)
    return row("fit less steps, ms", sizes, [1000 * one for one in outside], ms_target, totals, outside, around)


def row(measure: str, sizes: dict, values: list[float], target: float, whole, part=None, around=None) -> dict:
    """A row; `around_steps_ms` is what is neither forward, backward, clipping nor the optimizer's step."""
    columns = {"whole_ms": whole, "part_ms": part, "around_steps_ms": around}
    medians = {name: 1000 * statistics.median(seconds) if seconds else None for name, seconds in columns.items()}
    names = ("hidden_size", "num_layers", "num_clients", "local_steps")
    sizes = dict(zip(names, (*sizes["model"][:2], sizes["num_clients"], sizes["local_steps"]), strict=True))
    return {"measure": measure, **sizes, **medians, **spread(values), "target": target}


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--wire_rounds", type=int, default=3, help="Rounds of the small run.")
    arguments.add_argument("--rounds", type=int, default=5, help="Rounds of one client for each row of `fit`.")
    args = arguments.parse_args()
    small, larger = SMALL, LARGER
    if args.quick:
        args.wire_rounds, args.rounds = 1, 2
        small, larger = ({**sizes, "local_steps": 3, "alignment_steps": 1} for sizes in (SMALL, LARGER))
    rows = [measure_wire(small, args.wire_rounds), measure_fit(larger, args.rounds, share_target=0.05)]
    rows += [measure_fit({**TOY, "local_steps": steps}, args.rounds, ms_target=150.0) for steps in (30, 1)]
    show("A round beyond its training steps", rows, args.json)


if __name__ == "__main__":
    main()
