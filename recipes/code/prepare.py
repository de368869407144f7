"""
Make the code recipe's files: coding instructions, one client for each programming language.

    python recipes/code/prepare.py --output_dir outputs/code-data --more_public openai/gsm8k

An example belongs to the client whose language its instruction names. Examples that name none of the clients'
languages are public. Those that name several of them are left out, and so are those whose prompt or completion
occurred before, so that no text is on two sides. What is written, in prompt-completion form:

    clients/python.jsonl, ...   private training examples
    eval.jsonl                  held-out private examples, equally many of each language, with a column `language`
    public.jsonl                the public examples, and the problems of `--more_public`
    humaneval.jsonl             with `--humaneval`: HumanEval's problems, with `test` and `entry_point`

CodeAlpaca is CC BY-NC 4.0, GSM8K and HumanEval are MIT.
"""

import argparse
import os
import re
import runpy
from pathlib import Path

from datasets import Dataset, load_dataset


format_example = runpy.run_path(str(Path(__file__).parents[1] / "gsm8k" / "pretrain.py"))["format_example"]

# What names a language; \b does not end a word after a plus sign.
LANGUAGES = {
    "cpp": re.compile(r"\bc\+\+|\bcpp\b", re.IGNORECASE),
    "java": re.compile(r"\bjava\b", re.IGNORECASE),
    "javascript": re.compile(r"\bjavascript\b|\bjs\b|\bnodejs\b|\bjquery\b", re.IGNORECASE),
    "python": re.compile(r"\bpython\d?\b", re.IGNORECASE),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder that receives the files.")
    parser.add_argument(
        "--instructions",
        default="sahil2801/CodeAlpaca-20k",
        help="Set with `instruction`, `input` and `output`: Hub name or JSON lines file.",
    )
    parser.add_argument("--more_public", help="Set with `question` and `answer`, all of it public: openai/gsm8k.")
    parser.add_argument("--humaneval", help="openai/openai_humaneval, or HumanEval.jsonl.gz.")
    parser.add_argument("--eval_per_language", type=int, default=30, help="Held-out examples of each language.")
    parser.add_argument("--min_train_examples", type=int, default=150, help="Fewest that a client may keep.")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def named_languages(instruction: str) -> list[str]:
    """The clients' languages that an instruction names."""
    return [language for language, pattern in LANGUAGES.items() if pattern.search(instruction)]


def assign(rows: Dataset) -> tuple[dict[str, list[dict]], list[dict]]:
    """Each client's examples by language, and the public examples. No prompt or completion occurs twice."""
    private: dict[str, list[dict]] = {language: [] for language in LANGUAGES}
    public, seen = [], set()
    for row in rows:
        example = format_example(row["instruction"], row["output"], row["input"])
        languages = named_languages(row["instruction"])
        if len(languages) > 1 or not row["output"].strip() or not seen.isdisjoint(example.values()):
            continue
        seen.update(example.values())
        if languages:
            private[languages[0]].append(example | {"language": languages[0]})
        else:
            public.append(example)
    return private, public


def hold_out(
    private: dict[str, list[dict]], eval_per_language: int, min_train_examples: int, seed: int
) -> tuple[dict[str, Dataset], Dataset]:
    """
    Split off the held-out examples of each language.

    Raises:
        ValueError: If a client would be left with fewer than `min_train_examples` examples.
    """
    clients, heldout = {}, []
    for language, examples in private.items():
        num_train = len(examples) - eval_per_language
        if num_train < min_train_examples:
            raise ValueError(
                f"`eval_per_language` is {eval_per_language}, which leaves client '{language}' {num_train} of its "
                f"{len(examples)} examples, but `min_train_examples` is {min_train_examples}. Lower one of the two or "
                "pass more instructions."
            )
        shuffled = Dataset.from_list(examples).shuffle(seed=seed)
        heldout.extend(shuffled.select(range(eval_per_language)))
        clients[language] = shuffled.select(range(eval_per_language, len(examples)))
    return clients, Dataset.from_list(heldout)


def load(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """A Hub dataset, or a JSON lines file, which has one split."""
    if os.path.isfile(name):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, config, split=split)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    (folder / "clients").mkdir(parents=True, exist_ok=True)

    private, public = assign(load(args.instructions))
    clients, heldout = hold_out(private, args.eval_per_language, args.min_train_examples, args.seed)
    if args.more_public is not None:
        public += [format_example(row["question"], row["answer"]) for row in load(args.more_public, "main")]

    files = {f"clients/{language}": dataset for language, dataset in clients.items()}
    files |= {"eval": heldout, "public": Dataset.from_list(public)}
    if args.humaneval is not None:
        problems = load(args.humaneval, split="test").rename_column("canonical_solution", "completion")
        files["humaneval"] = problems.select_columns(["task_id", "prompt", "completion", "test", "entry_point"])
    for name, dataset in files.items():
        dataset.to_json(folder / f"{name}.jsonl")
        print(f"{name}.jsonl: {len(dataset):,} examples")


if __name__ == "__main__":
    main()
