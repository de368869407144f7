"""
What the proximal term costs: a client's step with `proximal_weight` 0.01 against one with 0.

Steps of both kinds alternate in one training (forward, backward, clipping, AdamW), and CPU time is compared, so that
other work on the machine falls on both alike. A block of steps gives one ratio of medians; the spread is over blocks.

    python benchmarks/client_step.py --json client_step.json
"""

import statistics
import tempfile

from common import StepClock, parser, random_llama, show, spread, timed, token_dataset, word_tokenizer
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback

from fedbiot_trainer import ClientSFTTrainer, FedBiOTConfig, FederatedServer
from fedbiot_trainer.lora import CLIENT, lora_factors
from fedbiot_trainer.losses import proximal_term


TARGET = 1.03
WEIGHTS = (0.0, 0.01)


class Alternate(StepClock):
    """Gives the steps of a training both weights in turn."""

    def __init__(self):
        super().__init__()
        self.weights: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        # 0 1 1 0 0 1 1 0: neither kind always comes first.
        args.proximal_weight = WEIGHTS[(state.global_step + 1) // 2 % 2]
        self.weights.append(args.proximal_weight)
        super().on_step_begin(args, state, control)


def term_alone(model: PeftModel, repetitions: int = 50) -> float:
    """CPU seconds of the proximal term by itself, forward and backward, as in `ClientSFTTrainer.compute_loss`."""
    reference = [(a.detach().clone(), b.detach().clone()) for a, b in lora_factors(model, CLIENT)[0]]

    def step():
        factors, scalings = lora_factors(model, CLIENT)
        proximal_term(factors, reference, scalings).backward()

    seconds: list[float] = []
    for _ in range(repetitions):
        timed(seconds, step)()
    return statistics.median(seconds)


def measure(args, vocab_size: int, batch_size: int) -> dict:
    steps = 2 * args.pairs * args.blocks
    with tempfile.TemporaryDirectory() as folder:
        config = FedBiOTConfig(
            folder,
            num_adapter_layers=2,
            emulator_drop_ratio=args.emulator_drop_ratio,
            initial_alignment_steps=0,
            alignment_steps=0,
            num_rounds=1,
            local_steps=steps + 2,
            per_device_train_batch_size=batch_size,
            report_to="none",
        ).quiet()
        model = random_llama(args.hidden_size, args.num_layers, vocab_size)
        tokenizer = word_tokenizer(vocab_size)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        emulator = FederatedServer(model, config, None, tokenizer, lora).split_model.emulator
        data = token_dataset(2 * batch_size, args.num_tokens, vocab_size)
        clock = Alternate()
        trainer = ClientSFTTrainer(emulator, config, data, processing_class=tokenizer, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # The first step of each kind warms up.
    without, with_term = (
        [seconds for seconds, used in zip(clock.seconds, clock.weights, strict=True) if used == weight][1:]
        for weight in WEIGHTS
    )
    blocks = [slice(i * args.pairs, (i + 1) * args.pairs) for i in range(args.blocks)]
    return {
        "hidden_size": args.hidden_size,
        "num_layers": len(emulator.get_base_model().model.layers),
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "num_tokens": args.num_tokens,
        "step_ms": 1000 * statistics.median(without),
        "term_ms": 1000 * term_alone(trainer.model),
        **spread(statistics.median(with_term[block]) / statistics.median(without[block]) for block in blocks),
        "target": TARGET,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=512)
    arguments.add_argument("--num_layers", type=int, default=8, help="Decoder layers of the full model.")
    arguments.add_argument("--emulator_drop_ratio", type=float, default=0.5)
    arguments.add_argument("--num_tokens", type=int, default=128, help="Tokens per example.")
    arguments.add_argument("--pairs", type=int, default=6, help="Steps of each kind in a block.")
    arguments.add_argument("--blocks", type=int, default=5)
    args = arguments.parse_args()
    if args.quick:
        args.pairs, args.blocks = 4, 2
    cases = [(vocab, batch) for vocab in (512, 32000) for batch in (4, 8)]
    rows = [measure(args, *case) for case in (cases[:1] if args.quick else cases)]
    show("Client step: proximal_weight 0.01 against 0", rows, args.json)


if __name__ == "__main__":
    main()
