"""
Pre-train the base model of a recipe at CPU size: 10.5 M parameters, from scratch, on public text only.

By default that is the base of the GSM8K recipe, from coding instructions. It never reads GSM8K, which stays with the
clients. About 25 minutes on one CPU core that has bfloat16 matmuls:

    python recipes/gsm8k/pretrain.py --output_dir gsm8k-base

The public set may also be in prompt-completion form, like the one of recipes/code/prepare.py. The result is a plain
Hugging Face folder, model and tokenizer. CodeAlpaca, the default public set, is CC BY-NC 4.0.
"""

import argparse
import os
import time
from collections.abc import Iterator

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup


VOCAB_SIZE = 4096
MAX_LENGTH = 1024


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder that receives the model and the tokenizer.")
    parser.add_argument("--public_data", default="sahil2801/CodeAlpaca-20k", help="Hub name or JSON lines file.")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch_size", type=int, default=4, help="Blocks per step; 4 x 512 tokens = 2,048 per step.")
    parser.add_argument("--block_size", type=int, default=512, help="Tokens per block.")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument("--eval_steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def format_example(instruction: str, response: str, context: str = "") -> dict[str, str]:
    """
    Lay out one example as the base model knows it, in the prompt-completion format of TRL.

    The end-of-sequence token is not part of the text: whoever tokenizes appends it to the completion.
    """
    context_line = f"Input: {context}\n" if context else ""
    return {"prompt": f"Instruction: {instruction}\n{context_line}Response:", "completion": f" {response}"}


def load_public_texts(public_data: str, seed: int) -> tuple[list[str], list[str]]:
    """
    Load a set with `prompt` and `completion`, or with `instruction`, `input` and `output`.

    Returns the training texts and 5 % held-out texts.
    """
    path, data_files = ("json", public_data) if os.path.isfile(public_data) else (public_data, None)
    splits = load_dataset(path, data_files=data_files, split="train").train_test_split(test_size=0.05, seed=seed)
    return to_texts(splits["train"]), to_texts(splits["test"])


def to_texts(dataset: Dataset) -> list[str]:
    examples = dataset
    if "completion" not in dataset.column_names:
        examples = [format_example(row["instruction"], row["output"], row["input"]) for row in dataset]
    return [example["prompt"] + example["completion"] for example in examples]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", model_max_length=MAX_LENGTH
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; 12 layers, so that half the emulator can be dropped below 2 adapter layers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pack(examples: list[torch.Tensor], block_size: int) -> torch.Tensor:
    """Concatenate tokenized examples and cut them into blocks, of shape `(num_blocks, block_size)`; drops the rest."""
    tokens = torch.cat(examples)
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def iterate_batches(examples: list[torch.Tensor], batch_size: int, block_size: int) -> Iterator[torch.Tensor]:
    """Yield batches without end; every epoch shuffles the examples before packing, so that no two blocks repeat."""
    while True:
        blocks = pack([examples[i] for i in torch.randperm(len(examples)).tolist()], block_size)
        if len(blocks) < batch_size:
            fits = f"set `--batch_size` {max(1, len(blocks))} or a smaller `--block_size`."
            raise ValueError(f"The public set fills only {len(blocks)} blocks, less than one batch: {fits}")
        yield from blocks[: len(blocks) // batch_size * batch_size].split(batch_size)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, blocks: torch.Tensor, batch_size: int) -> tuple[float, float]:
    """Return the mean loss per token and the share of tokens whose most likely prediction is right."""
    model.eval()
    loss_sum, num_correct, num_tokens = 0.0, 0, 0
    for batch in blocks.split(batch_size):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(input_ids=batch, labels=batch)
        labels = batch[:, 1:]
        loss_sum += output.loss.item() * labels.numel()
        num_correct += (output.logits[:, :-1].argmax(dim=-1) == labels).sum().item()
        num_tokens += labels.numel()
    model.train()
    return loss_sum / num_tokens, num_correct / num_tokens


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)

    train_texts, heldout_texts = load_public_texts(args.public_data, args.seed)
    tokenizer = train_tokenizer(train_texts)
    train_examples, heldout_examples = (
        [torch.tensor(ids + [tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]]
        for texts in (train_texts, heldout_texts)
    )
    heldout_blocks = pack(heldout_examples, args.block_size)

    model = build_model(tokenizer)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, args.steps, min_lr_rate=0.05)

    tokens_per_step = args.batch_size * args.block_size
    num_epochs = args.steps * tokens_per_step / sum(len(example) for example in train_examples)
    print(f"{model.num_parameters():,} parameters | {len(train_examples)} examples | {num_epochs:.1f} epochs")
    model.train()
    start = time.perf_counter()
    batches = iterate_batches(train_examples, args.batch_size, args.block_size)
    for step, batch in zip(range(1, args.steps + 1), batches, strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

        if step % 20 == 0:
            seconds_per_step = (time.perf_counter() - start) / step
            speed, eta = tokens_per_step / seconds_per_step, seconds_per_step * (args.steps - step) / 60
            print(f"step {step} | loss {loss.item():.3f} | {speed:.0f} tokens/s | ETA {eta:.1f} min", flush=True)
        if step % args.eval_steps == 0 or step == args.steps:
            heldout_loss, accuracy = evaluate(model, heldout_blocks, args.batch_size)
            print(f"step {step} | held-out loss {heldout_loss:.3f} | token accuracy {accuracy:.3f}", flush=True)

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(f"saved to {args.output_dir} after {(time.perf_counter() - start) / 60:.1f} min")


if __name__ == "__main__":
    main()
