"""What the benchmarks share: random models, generated data, tables."""

import argparse
import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from peft.tuners import lora
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fedbiot_trainer.shared.lora_layers import FusedLoraLinear


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that every benchmark has."""
    torch.set_num_threads(1)
    disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Under a minute: checks that it runs, not the figures.")
    parser.add_argument("--json", metavar="FILE", help="Write the rows to this file.")
    return parser


def random_llama(hidden_size: int, num_layers: int, vocab_size: int, intermediate_size: int | None = None):
    """A Llama with random weights, one head per 64 hidden units and at least 4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=max(4, hidden_size // 64),
        num_key_value_heads=max(4, hidden_size // 64),
        vocab_size=vocab_size,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def as_peft_runs_it(model: PeftModel) -> PeftModel:
    """A copy with PEFT's own LoRA layers and the model's own forward pass."""
    model = copy.deepcopy(model)
    vars(model.get_base_model()).pop("forward", None)  # TRL's, bound to the original
    for module in model.modules():
        if isinstance(module, FusedLoraLinear):
            module.__class__ = lora.Linear
    return model


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers. The trainers ask for one, but the data needs none."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0", pad_token="1", eos_token="2")


def token_dataset(num_examples: int, num_tokens: int, vocab_size: int, seed: int = 0) -> Dataset:
    """Random token sequences of one length, as a tokenized dataset."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (num_examples, num_tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum, as the columns of a row."""
    values = sorted(values)
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    return {"ratio_median": middle, "ratio_min": values[0], "ratio_max": values[-1]}


def timed(seconds: list[float], function: Callable) -> Callable:
    """`function`, with the CPU seconds of each call appended to `seconds`."""

    def call(*args, **kwargs):
        started = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - started)

    return call


class StepClock(TrainerCallback):
    """CPU seconds of each of a training's steps: forward, backward, clipping and the optimizer's step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self._started)


def show(title: str, rows: list[dict], file: str | None):
    """Print the rows as a table and, if `file` is given, write them as JSON."""
    table = Table(title=title, title_justify="left", show_edge=False)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0].get(name), str) else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)
    if file:
        Path(file).write_text(json.dumps(rows, indent=2) + "\n")


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.1f}"
    return "" if value is None else str(value)
