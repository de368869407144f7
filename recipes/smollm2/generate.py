"""
Let a model write public text in the form of a task's clients, for <task>/generated.jsonl beside prepare.py's files:

    python recipes/smollm2/generate.py --tasks svamp xquad
    python recipes/smollm2/generate.py --tasks svamp --labels Question: Answer: --max_new_tokens 70 50

All that the model is given are the form's labels, no word of a client: it continues the first one, then, on a new line,
the next. Like the other public sets, half of the file is general text: that of near.jsonl, in its order.
"""

import argparse
import re
import runpy
import sys
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


prepare = runpy.run_path(str(Path(__file__).parent / "prepare.py"))

Form = dict[str, int]  # the most tokens after each label
FORMS: dict[str, Form] = {
    "svamp": {"Question:": 70, "Answer:": 50},
    "xquad": {"The": 120, "Question:": 50, "Answer:": 50},  # a passage has no label; this one starts like many
    "medquad": {"Question:": 40, "Answer:": 120},
    "gsm8k": {"Question:": 70, "Answer:": 100},
    "code": {"Instruction:": 60, "Response:": 120},
}
MAX_TRIES = 10  # texts for each that is wanted
SENTENCES = re.compile(r".*[.!?](?=\s|$)", re.DOTALL)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2/model", help="Folder or Hub name of a language model.")
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/smollm2"), help="With a folder for each task.")
    parser.add_argument("--tasks", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="TASK")
    parser.add_argument(
        "--labels", nargs="+", help="What is written for the model, line by line, if not a task's own."
    )
    parser.add_argument("--max_new_tokens", nargs="+", type=int, help="After each of `--labels`.")
    parser.add_argument("--start", default="<|endoftext|>", help="What a document starts with for the model.")
    parser.add_argument("--num_texts", type=int, default=170, help="Generated texts; as many general ones are added.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    if args.num_texts < 1 or args.batch_size < 1:
        parser.error("`--num_texts` and `--batch_size` must be at least 1")
    labels, limits = args.labels or [], args.max_new_tokens or []
    if len(labels) != len(limits) or len(labels) == 1 or len(set(labels)) < len(labels):
        parser.error(
            f"`--labels` are {labels} and `--max_new_tokens` {limits}: give two or more labels that differ and a limit "
            "for each, or leave both out"
        )
    if any(limit < 1 for limit in limits):
        parser.error(f"`--max_new_tokens` are {limits}, but each must be at least 1")
    return args


def read_general(file: Path, count: int) -> list[dict[str, str]]:
    """
    The general half of a task's near text.

    Raises:
        FileNotFoundError: If prepare.py has not been run.
        ValueError: If it is less than `count` texts.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"`--data_dir` has no {file.parent.name}/{file.name}, the general text of which is one half of what is "
            f"written. Run `python recipes/smollm2/prepare.py --tasks {file.parent.name}` first."
        )
    general = list(load_dataset("json", data_files=str(file), split="train"))[::2]
    if len(general) < count:
        raise ValueError(f"`--num_texts` is {count}, but {file} has {len(general)} general texts. Ask for no more.")
    return general[:count]


def load(name: str):
    """
    Model and tokenizer, in bfloat16 and on the GPU if there is one.

    Raises:
        FileNotFoundError: If there is no model of that name.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`--model` is '{name}', which cannot be loaded: {error}\nName a causal language model, or make that of the "
            "recipe with `python recipes/smollm2/make_model.py --output_dir outputs/smollm2/model`."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def continue_texts(model, tokenizer, texts: list[str], max_new_tokens: int) -> list[str]:
    """What the model writes after each of `texts`, drawn from the 95 % of its distribution that are likeliest."""
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    outputs = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=0.95,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def tidy(text: str, end: str) -> str:
    """
    What comes before `end`, a pattern, or else the whole sentences if there are any. One space stays before it, if any
    white space was there.
    """
    lead = " " if text[:1].isspace() else ""
    first, *rest = re.split(end, text.strip(), maxsplit=1)
    sentences = None if rest else SENTENCES.match(first)
    first = sentences.group() if sentences else first.strip()
    return lead + first if first else ""


def write_batch(model, tokenizer, form: Form, start: str, batch_size: int) -> list[dict[str, str]]:
    """At most `batch_size` examples: texts in which the model leaves a part empty are dropped."""
    *before, last = form
    ends = dict.fromkeys(before, "\n") | {last: "\n\n|\n(?=" + "|".join(map(re.escape, form)) + ")"}
    prompts, parts = [""] * batch_size, [""] * batch_size
    for label, end in ends.items():
        new_line = "\n" if label != next(iter(form)) else ""
        prompts = [prompt + part + new_line + label for prompt, part in zip(prompts, parts, strict=True)]
        parts = continue_texts(model, tokenizer, [start + prompt for prompt in prompts], form[label])
        written = [(prompt, tidy(part, end)) for prompt, part in zip(prompts, parts, strict=True)]
        prompts, parts = [p for p, part in written if part], [part for _, part in written if part]
        if not prompts:
            break
    return [{"prompt": prompt, "completion": part} for prompt, part in zip(prompts, parts, strict=True)]


def write_texts(model, tokenizer, form: Form, args: argparse.Namespace, task: str) -> tuple[list[dict[str, str]], int]:
    """
    `--num_texts` examples, and how many texts were dropped for them.

    Raises:
        RuntimeError: If of ten times as many texts too few are in the form.
    """
    examples: list[dict[str, str]] = []
    tried = 0
    with tqdm(total=args.num_texts, desc=task, unit="text") as progress:
        while len(examples) < args.num_texts:
            if tried >= MAX_TRIES * args.num_texts:
                raise RuntimeError(
                    f"of {tried} texts for {task} the model left a part empty in {tried - len(examples)}. Give it other "
                    "`--labels`, or a `--start` with which its documents begin."
                )
            batch = write_batch(model, tokenizer, form, args.start, args.batch_size)
            tried += args.batch_size
            examples += batch
            progress.update(min(len(batch), args.num_texts - progress.n))
    return examples[: args.num_texts], tried - len(examples)


def main():
    args = parse_args()
    try:
        general = {task: read_general(args.data_dir / task / "near.jsonl", args.num_texts) for task in args.tasks}
        model, tokenizer = load(args.model)
        for task in args.tasks:
            set_seed(args.seed)
            form = dict(zip(args.labels, args.max_new_tokens, strict=True)) if args.labels else FORMS[task]
            written, dropped = write_texts(model, tokenizer, form, args, task)
            examples = prepare["in_turn"](general[task], written)
            Dataset.from_list(examples).to_json(args.data_dir / task / "generated.jsonl")
            print(
                f"{task}/generated.jsonl: {len(examples):,} examples, half of them generated; {dropped} were dropped"
            )
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"generate.py: error: {error}")


if __name__ == "__main__":
    main()
