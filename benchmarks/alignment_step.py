"""
What alignment costs: a step (forward and backward) against one forward and backward pass of the same emulator with the
same trainable LoRA, as plain PEFT runs it, under the model's own loss.

Both run on the same batch, in turn, in one process, and CPU time is compared, so that other work on the machine falls
on both alike. A block of such turns gives one ratio of medians; the spread is over blocks.

    python benchmarks/alignment_step.py --json alignment_step.json
"""

import statistics
import tempfile

from common import as_peft_runs_it, parser, random_llama, show, spread, timed, token_dataset, word_tokenizer
from peft import LoraConfig

from fedbiot_trainer import EmulatorAlignmentTrainer, FedBiOTConfig
from fedbiot_trainer.shared.lora_state import CLIENT, get_lora_state, set_lora_state, set_trainable_lora


TARGETS = {("cached", 512): 1.15, ("cached", 32000): 1.3, ("online", 512): 1.6}


def make_trainer(args, teacher: str, drop_ratio: float, batch_size: int, vocab_size: int, folder: str):
    """An alignment trainer in the middle of a run: its client LoRA is not zero, its store is there."""
    config = FedBiOTConfig(
        folder,
        num_adapter_layers=args.num_adapter_layers,
        emulator_drop_ratio=drop_ratio,
        alignment_batch_size=batch_size,
        initial_alignment_steps=1,
        num_rounds=1,
        alignment_steps=0,
        teacher=teacher,
        teacher_cache_dir=folder,
        report_to="none",
        disable_tqdm=True,
    ).quiet()
    trainer = EmulatorAlignmentTrainer(
        random_llama(args.hidden_size, args.num_layers, vocab_size),
        config,
        token_dataset(batch_size, args.num_tokens, vocab_size),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        processing_class=word_tokenizer(vocab_size),
    )
    models = trainer.models
    state = {key: t + 0.01 for key, t in get_lora_state(models.adap_emu, CLIENT).items()}
    set_lora_state(models.adap_emu, CLIENT, state)
    models.plug_in(state)
    trainer.prepare_teacher()
    set_trainable_lora(trainer.model, trainer.lora_name)
    return trainer


def measure(args, teacher: str, drop_ratio: float, batch_size: int, vocab_size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, teacher, drop_ratio, batch_size, vocab_size, folder)
        model = trainer.model.train()
        batch = next(iter(trainer.get_train_dataloader()))
        text = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

        plain_model = as_peft_runs_it(model)

        def plain():
            plain_model(**text, labels=text["input_ids"], use_cache=False).loss.backward()

        def step():
            trainer.compute_loss(model, dict(batch)).backward()

        folded = trainer.folded_client_lora()  # as `train()` does, once for all its steps

        blocks = []
        with folded:
            for block in range(args.blocks + 1):  # the first warms up
                seconds: dict = {plain: [], step: []}
                for turn in range(args.turns if block else 2):
                    for function in (plain, step) if turn % 2 else (step, plain):
                        model.zero_grad()
                        plain_model.zero_grad()
                        timed(seconds[function], function)()
                blocks.append({function: statistics.median(values) for function, values in seconds.items()})
    blocks = blocks[1:]
    return {
        "teacher": teacher,
        "beta": drop_ratio,
        "hidden_size": args.hidden_size,
        "num_layers": f"{len(trainer.models.split.full_indices)} of {args.num_layers}",
        "vocab_size": vocab_size,
        "batch_size": batch_size,
        "num_tokens": args.num_tokens,
        "plain_ms": 1000 * statistics.median(block[plain] for block in blocks),
        "step_ms": 1000 * statistics.median(block[step] for block in blocks),
        **spread(block[step] / block[plain] for block in blocks),
        "target": TARGETS.get((teacher, vocab_size)),
    }


def main():
    arguments = parser(__doc__)
    arguments.add_argument("--hidden_size", type=int, default=512)
    arguments.add_argument("--num_layers", type=int, default=8, help="Decoder layers of the full model.")
    arguments.add_argument("--num_adapter_layers", type=int, default=2)
    arguments.add_argument("--num_tokens", type=int, default=128, help="Tokens per example.")
    arguments.add_argument("--turns", type=int, default=6, help="Steps of each kind in a block.")
    arguments.add_argument("--blocks", type=int, default=5)
    args = arguments.parse_args()
    cases = [
        (teacher, beta, batch, 512) for teacher in ("cached", "online") for beta in (0.2, 0.5) for batch in (4, 8)
    ]
    cases += [("cached", beta, 4, 32000) for beta in (0.2, 0.5)]
    if args.quick:
        args.turns, args.blocks, cases = 2, 2, cases[2::4]
    rows = [measure(args, *case) for case in cases]
    show("Alignment step against a plain forward and backward pass of the emulator", rows, args.json)


if __name__ == "__main__":
    main()
