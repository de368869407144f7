"""
What a client's step costs, proximal term included, against a step of TRL's `SFTTrainer` on the same emulator with the
same trainable LoRA, as plain PEFT runs it.

Both trainers take a few steps in turn, in one process (forward, backward, clipping, AdamW), and CPU time is compared, so
that other work on the machine falls on both alike. A turn gives one ratio of medians; the spread is over turns. The
proximal term by itself is measured too.

    python benchmarks/client_step.py --json client_step.json
"""

import statistics
import tempfile

from common import StepClock, as_peft_runs_it, parser, random_llama, show, spread, timed, token_dataset, word_tokenizer
from peft import LoraConfig, PeftModel
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedbiot_trainer import ClientSFTTrainer, FedBiOTConfig, FederatedServer
from fedbiot_trainer.client.proximal import proximal_term
from fedbiot_trainer.shared.lora_state import CLIENT, lora_factors, set_trainable_lora


TARGET = 1.05


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


def make_trainers(args, vocab_size: int, batch_size: int, folder: str):
    """Our trainer and TRL's, on emulators that share the frozen tensors."""
    shared = {"per_device_train_batch_size": batch_size, "report_to": "none", "bf16": False, "learning_rate": 5e-4}
    config = FedBiOTConfig(
        folder,
        num_adapter_layers=2,
        emulator_drop_ratio=args.emulator_drop_ratio,
        initial_alignment_steps=0,
        alignment_steps=0,
        num_rounds=1000,
        local_steps=args.steps + 1,
        **shared,
    ).quiet()
    plain_config = SFTConfig(
        folder, max_steps=args.steps + 1, logging_strategy="no", save_strategy="no", disable_tqdm=True,
        activation_checkpointing=False, lr_scheduler_type="constant", adam_beta2=0.95, **shared,
    )  # fmt: skip
    tokenizer = word_tokenizer(vocab_size)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = random_llama(args.hidden_size, args.num_layers, vocab_size)
    ours, theirs = (FederatedServer(model, config, None, tokenizer, lora).models.adap_emu for _ in range(2))
    theirs = as_peft_runs_it(theirs)
    set_trainable_lora(theirs, CLIENT)
    data = token_dataset(2 * batch_size, args.num_tokens, vocab_size)
    trainers = (
        ClientSFTTrainer(ours, config, data, processing_class=tokenizer, callbacks=[StepClock()]),
        SFTTrainer(theirs, plain_config, train_dataset=data, processing_class=tokenizer, callbacks=[StepClock()]),
    )
    for trainer in trainers:
        trainer.remove_callback(PrinterCallback)
    return trainers


def seconds_per_step(trainer) -> float:
    """Median of the next steps, the first left out."""
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepClock))
    clock.seconds.clear()
    trainer.train()
    return statistics.median(clock.seconds[1:])


def measure(args, vocab_size: int, batch_size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = make_trainers(args, vocab_size, batch_size, folder)
        turns = []
        for turn in range(args.turns + 1):  # the first warms up
            order = (ours, theirs) if turn % 2 else (theirs, ours)
            taken = {trainer: seconds_per_step(trainer) for trainer in order}
            turns.append((taken[ours], taken[theirs]))
    turns = turns[1:]
    return {
        "hidden_size": args.hidden_size,
        "num_layers": len(ours.model.get_base_model().model.layers),
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "num_tokens": args.num_tokens,
        "plain_ms": 1000 * statistics.median(theirs for _, theirs in turns),
        "step_ms": 1000 * statistics.median(ours for ours, _ in turns),
        "term_ms": 1000 * term_alone(ours.model),
        **spread(ours / theirs for ours, theirs in turns),
        "target": TARGET,
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=512)
    arguments.add_argument("--num_layers", type=int, default=8, help="Decoder layers of the full model.")
    arguments.add_argument("--emulator_drop_ratio", type=float, default=0.5)
    arguments.add_argument("--num_tokens", type=int, default=128, help="Tokens per example.")
    arguments.add_argument("--steps", type=int, default=6, help="Steps of each trainer in a turn.")
    arguments.add_argument("--turns", type=int, default=5)
    args = arguments.parse_args()
    if args.quick:
        args.steps, args.turns = 4, 2
    cases = [(vocab, batch) for vocab in (512, 32000) for batch in (4, 8)]
    rows = [measure(args, *case) for case in (cases[:1] if args.quick else cases)]
    show("Client step with the proximal term against a step of TRL's SFTTrainer", rows, args.json)


if __name__ == "__main__":
    main()
