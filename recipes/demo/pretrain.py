"""
Pre-train the demo's base model from scratch on the demo's own public corpus, tokenizer included.

    python recipes/demo/pretrain.py --output_dir recipes/demo/base

1.7 M parameters, 4500 steps of 128 examples, about half an hour of one CPU core that has bfloat16 matmuls. The base in
`recipes/demo/base` was made with the defaults: 99.0 % greedy exact match on 2000 held-out public examples, measured in
float32 on the stored bfloat16 weights. Needs torch 2.9 or newer for `torch.optim.Muon`.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from task import public_examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup


def build_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [row["prompt"] + row["completion"] for row in public_examples(20_000, seed)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=10,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # The plain attention is the fastest one on CPU for sequences this short.
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def batches(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, num_steps: int, prompt_weight: float, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Yields fresh text for `num_steps` steps: token ids and loss weights, both `(batch_size, sequence_length)`.

    Rows of about the same length share a batch, so that little is spent on padding. The first half of the steps is a
    curriculum from short questions to the whole corpus: a sum is cheaper to learn in 10 tokens than in 30.
    """
    rng = random.Random(seed)
    chunks_per_draw = 50
    for step in range(0, num_steps, chunks_per_draw):
        short_share = min(0.9, max(0.0, 1.5 * (1 - 2 * step / num_steps)))
        rows = public_examples(chunks_per_draw * batch_size, seed=rng.getrandbits(60), short_share=short_share)
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        completions = tokenizer([row["completion"] + tokenizer.eos_token for row in rows])["input_ids"]
        pairs = sorted(zip(prompts, completions, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            length = max(len(prompt) + len(completion) for prompt, completion in chunk)
            input_ids = torch.full((batch_size, length), tokenizer.pad_token_id)
            weights = torch.zeros(batch_size, length)
            for i, (prompt, completion) in enumerate(chunk):
                end = len(prompt) + len(completion)
                input_ids[i, :end] = torch.tensor(prompt + completion)
                weights[i, : len(prompt)] = prompt_weight
                weights[i, len(prompt) : end] = 1.0
            yield input_ids, weights


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    # Muon for the matrices of the layers, AdamW for the embeddings and norms.
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for name, p in model.named_parameters() if "layers" not in name or p.dim() == 1]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedulers = [get_cosine_schedule_with_warmup(o, args.steps // 20, args.steps) for o in optimizers]
    data = batches(tokenizer, args.batch_size, args.steps, args.prompt_weight, args.seed)
    rng = random.Random(args.seed)
    layers = list(model.model.layers)
    start = time.perf_counter()
    model.train()
    for step in range(1, args.steps + 1):
        input_ids, weights = next(data)
        # LayerDrop (Fan et al., 2020), more and more of it: first the skills, then a base that can lose a layer.
        drop = args.layer_drop * step / args.steps
        model.model.layers = nn.ModuleList(layer for layer in layers if rng.random() >= drop)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Padding is on the right, so the causal mask already hides it.
            logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), input_ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        model.zero_grad()
        if step % 50 == 0:
            answer_loss = losses[weights[:, 1:] == 1].mean().item()
            seconds = time.perf_counter() - start
            print(f"step {step} loss {loss.item():.3f} answer {answer_loss:.3f} {seconds:.0f} s", flush=True)
        if step % 500 == 0 and step < args.steps:
            model.model.layers = nn.ModuleList(layers)
            print(accuracy(model, tokenizer, public_examples(400, seed=args.seed, held_out=True)), flush=True)
            model.train()
    model.model.layers = nn.ModuleList(layers)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], batch_size: int = 200
) -> dict[str, float]:
    """Exact match of greedy answers, in percent, by skill and over all rows."""
    model.eval()
    hits = defaultdict(list)
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    for i in range(0, len(rows), batch_size):
        chunk = rows[i : i + batch_size]
        inputs = tokenizer([row["prompt"] for row in chunk], padding=True, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(chunk, texts, strict=True):
            hits[row["skill"]].append(text == row["completion"])
            hits["all"].append(text == row["completion"])
    return {skill: round(100 * sum(hit) / len(hit), 1) for skill, hit in sorted(hits.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch_size", type=int, default=128, help="examples per step, about 29 tokens each")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--layer_drop", type=float, default=0.1, help="share of layers skipped at the last step")
    parser.add_argument("--prompt_weight", type=float, default=0.1, help="weight of prompt tokens in the loss")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.vocab_size, args.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    train(model, tokenizer, args)

    # Stored in bfloat16 at half the size; what is measured is what is loaded again.
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    model = LlamaForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    print(json.dumps(accuracy(model, tokenizer, public_examples(2000, seed=args.seed, held_out=True)), indent=2))


if __name__ == "__main__":
    main()
