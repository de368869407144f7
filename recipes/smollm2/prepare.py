"""
Make the files of the recipe's tasks: private text for training, held-out private text, and public text.

    python recipes/smollm2/prepare.py                        # all tasks, from the Hugging Face Hub
    python recipes/smollm2/prepare.py --tasks svamp --from data   # from JSON lines files in a folder

What is written for each task, in prompt-completion form:

    svamp/train.jsonl                 private: word problems in the style of MAWPS
    xquad/train.jsonl                 private: reading comprehension, 38 articles, with a column `article`
    gsm8k/train.jsonl                 private: grade-school mathematics
    medquad/clients/<institute>.jsonl private: medical questions, one client for each institute
    code/clients/<language>.jsonl     private: coding instructions, one client for each language
    <task>/eval.jsonl                 held out: SVAMP, ten other articles, GSM8K's test problems, other diseases, as
                                      many instructions of each language
    <task>/far.jsonl                  public: general instructions, and code where that is not the task
    <task>/near.jsonl                 public: half of it that, half of it text of another source in the clients' form
    <task>/template.jsonl             public: half of it that, half of it more of that in the clients' form
    <task>/domain.jsonl               public: half of it that, half of it the other source's text as instructions

The last two have one half of what makes text near each; `code` lacks them, for its far text has the clients' form.

No text is on two sides: public texts that share a line or 13 words in a row with private ones are left out,
and so are training examples that have a prompt or a whole answer in common with the held-out ones.
"""

import argparse
import operator
import random
import re
import runpy
from collections.abc import Callable
from itertools import chain, combinations, product
from math import isclose
from pathlib import Path

from datasets import Dataset


HERE = Path(__file__).parent
read = runpy.run_path(str(HERE / "sources.py"))["read"]
code = runpy.run_path(str(HERE.parent / "code" / "prepare.py"))

Example = dict[str, str]
Read = Callable[[str], list[dict]]
MAX_PASSAGE = 900  # characters of a context or a medical answer, about 200 tokens
MAX_ANSWER = 420  # of an answer that serves as a passage
MAX_PUBLIC = 700  # of a public text: the alignment reads 256 tokens
SHARED_WORDS = 13  # in a row: who has that many of another text has it from there
LABEL = re.compile("^(Question|Instruction|Input): ")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
STEPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SHARED_LINE = 30  # characters; shorter lines are anybody's


def ask(question: str, answer: str, **columns: str) -> Example:
    """The form of word problems and medical questions."""
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}", **columns}


def read_and_ask(context: str, question: str, answer: str, **columns: str) -> Example:
    """The form of reading comprehension."""
    return {"prompt": f"{context}\nQuestion: {question}\nAnswer:", "completion": f" {answer}", **columns}


def instruct(row: dict) -> Example:
    """The form of instructions."""
    return code["format_example"](row["instruction"], row["output"], row["input"])


def whole_question(row: dict) -> str:
    """An instruction and its input, where it has one."""
    return "\n".join(filter(None, (row["instruction"], row["input"])))


def as_instruction(example: Example) -> Example:
    """A question as an instruction. The response is the passage, where there is one, or else the answer."""
    passage, _, question = example["prompt"].removesuffix("\nAnswer:").rpartition("Question: ")
    return instruct({"instruction": question, "input": "", "output": passage.strip() or example["completion"].strip()})


def short_name(institute: str) -> str:
    """Of the folder in which the set has an institute: NHLBI_QA_XML is NHLBI."""
    return re.sub(r"_QA(_XML)?$|_", "", institute)


def first_sentence(text: str) -> str:
    return text.split(". ")[0][:100]


def about_answer(question: str, answer: str) -> Example:
    """Reading comprehension made of a question and a long answer: its start answers the question."""
    return read_and_ask(answer[:MAX_ANSWER], question, first_sentence(answer))


def only_step(question: str, answer: str) -> str | None:
    """`8 - 3`: two numbers of the question, in its order where it does not matter, and what makes the answer of them."""
    numbers = [number.replace(",", "") for number in NUMBER.findall(question)]
    for one, other in combinations(numbers, 2):
        for (a, b), name in product(((one, other), (other, one)), STEPS):
            if (name != "/" or float(b)) and isclose(STEPS[name](float(a), float(b)), float(answer)):
                return f"{a} {name} {b}"
    return None


# Each task: private examples by client ("" where they are dealt out later), held-out examples, and near public text.


def svamp(read: Read, rng: random.Random) -> tuple[dict[str, list[Example]], list[Example], list[Example]]:
    """Of the problems of one step the step that solves them: a model of this size reads better than it calculates."""
    train, heldout = (
        [ask(row["question"], step) for row in read(name) if (step := only_step(row["question"], row["answer"]))]
        for name in ("word_problems_train", "svamp_test")
    )
    other = [ask(row["question"], row["answer"]) for row in read("gsm8k_train")]
    return {"": train}, rng.sample(heldout, min(200, len(heldout))), other


def gsm8k(read: Read, rng: random.Random) -> tuple[dict[str, list[Example]], list[Example], list[Example]]:
    train, heldout, other = read("gsm8k_train"), read("gsm8k_test"), read("word_problems_train")
    form = [[ask(row["question"], row["answer"]) for row in rows] for rows in (train, heldout, other)]
    return {"": form[0]}, rng.sample(form[1], min(100, len(form[1]))), form[2]


def xquad(read: Read, rng: random.Random) -> tuple[dict[str, list[Example]], list[Example], list[Example]]:
    rows = [row for row in read("xquad_en") if len(row["context"]) < MAX_PASSAGE]
    examples = [
        read_and_ask(row["context"], row["question"], row["answer"], article=str(row["article"])) for row in rows
    ]
    train, heldout = apart(examples, "article", rng, share=0.2, limit=120)
    return {"": train}, heldout, [about_answer(row["question"], row["answer"]) for row in read("medquad")]


def medquad(read: Read, rng: random.Random) -> tuple[dict[str, list[Example]], list[Example], list[Example]]:
    examples = [
        ask(row["question"], row["answer"], institute=short_name(row["institute"]), focus=row["focus"].lower())
        for row in read("medquad")
        if len(row["answer"]) < MAX_PASSAGE
    ]
    train, heldout = apart(examples, "focus", rng, share=0.1, limit=100)
    clients: dict[str, list[Example]] = {}
    for example in train:
        clients.setdefault(example["institute"], []).append(example)
    return clients, heldout, [ask(row["question"], row["context"]) for row in read("xquad_en")]


def by_language(read: Read, rng: random.Random) -> tuple[dict[str, list[Example]], list[Example], list[Example]]:
    private, public = code["assign"](read("codealpaca"))
    clients, heldout = code["hold_out"](private, 25, 150, rng.randrange(2**31))
    return {name: list(rows) for name, rows in clients.items()}, list(heldout), public


TASKS = {"svamp": svamp, "xquad": xquad, "medquad": medquad, "gsm8k": gsm8k, "code": by_language}
# The clients' form of a general question and its answer. `code` has none: general instructions are in its form.
FORMS = {"svamp": ask, "xquad": about_answer, "medquad": ask, "gsm8k": ask}


def apart(
    examples: list[Example], column: str, rng: random.Random, share: float, limit: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples that have no value of `column` in common; at most `limit` are held out."""
    values = sorted({example[column] for example in examples})
    chosen = set(rng.sample(values, max(1, round(share * len(values)))))
    heldout = [example for example in examples if example[column] in chosen]
    return [e for e in examples if e[column] not in chosen], rng.sample(heldout, min(limit, len(heldout)))


def without_known(examples: list[Example], known: list[Example]) -> list[Example]:
    """Examples with neither a prompt nor a long completion that occurred before. A short one, a number, may."""
    seen = {text for example in known for text in (example["prompt"], example["completion"])}
    kept = []
    for example in examples:
        texts = {example["prompt"]} | ({example["completion"]} if len(example["completion"]) > 40 else set())
        if seen.isdisjoint(texts):
            seen |= texts
            kept.append(example)
    return kept


def whole(example: Example) -> str:
    return example["prompt"] + example["completion"]


def runs_of_words(example: Example) -> set[str]:
    """All runs of 13 words of an example; of one that is shorter, the whole."""
    words = whole(example).lower().split()
    count = max(1, len(words) - SHARED_WORDS + 1)
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(count)}


def parts(example: Example) -> set[str]:
    """The lines of an example's prompt and its completion, where they are long enough to tell where they are from."""
    texts = {LABEL.sub("", line).strip() for line in (*example["prompt"].split("\n"), example["completion"])}
    return {text for text in texts if len(text) > SHARED_LINE}


def without_private(examples: list[Example], private: list[Example]) -> list[Example]:
    """Public examples that fit the alignment and share nothing with private ones."""
    runs = set(chain.from_iterable(map(runs_of_words, private)))
    short = [e for e in examples if len(whole(e)) < MAX_PUBLIC and e["completion"].strip()]
    public = [example for example in short if runs.isdisjoint(runs_of_words(example))]
    everything = "\0".join(map(whole, public))
    found = [part for part in set(chain.from_iterable(map(parts, private))) if part in everything]
    return [example for example in public if not any(part in whole(example) for part in found)]


def in_turn(far: list[Example], other: list[Example]) -> list[Example]:
    """As many of each as there are of the fewer, one of each in turn."""
    return list(chain.from_iterable(zip(far, other, strict=False)))


def mix(far: list[Example], near: list[Example], rng: random.Random) -> list[Example]:
    """As many of each as there are of the fewer, drawn at random."""
    count = min(len(far), len(near))
    return in_turn(rng.sample(far, count), rng.sample(near, count))


def one_property(
    near: list[Example], rows: list[dict], form: Callable[[str, str], Example], private: list[Example]
) -> dict[str, list[Example]]:
    """
    What has the clients' form alone and what has the other source's text alone, with the general text that `near` has,
    in its order, and with the same text of the other source. No general text is in a set in both forms.
    """
    far, other = near[::2], near[1::2]
    row_of = {whole(instruct(row)): row for row in rows}
    half = len(far) // 2
    second = [row_of[whole(example)] for example in far[half:]]
    template = [form(whole_question(row), row["output"]) for row in second]
    return {
        "template": in_turn(far[:half], without_private(template, private)),
        "domain": in_turn(far, without_private([as_instruction(example) for example in other], private)),
    }


def make(task: str, read: Read, seed: int) -> dict[str, list[Example]]:
    """The examples of each of a task's files, by name."""
    rng = random.Random(seed)
    clients, heldout, near = TASKS[task](read, rng)
    heldout = without_known(heldout, [])
    known, files = list(heldout), {"eval": heldout}
    for name, examples in sorted(clients.items()):
        files[f"clients/{name}" if name else "train"] = own = without_known(examples, known)
        known += own
    rows = read("instructions") + (read("codealpaca") if task != "code" else [])
    general = [instruct(row) for row in rows]
    rng.shuffle(general)
    files["far"] = without_private(general, known)
    files["near"] = mix(files["far"], without_private(near, known), rng)
    if task in FORMS:
        files |= one_property(files["near"], rows, FORMS[task], known)
    return files


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2"), help="Receives a folder per task.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    parser.add_argument("--from", dest="folder", type=Path, help="Folder of JSON lines files, instead of the Hub.")
    parser.add_argument("--seed", type=int, default=42, help="Of what is held out and of the order of public text.")
    return parser.parse_args()


def main():
    args = parse_args()
    for task in args.tasks:
        for name, examples in make(task, lambda name: read(name, args.folder), args.seed).items():
            file = args.output_dir / task / f"{name}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(examples).to_json(file)
            print(f"{task}/{name}.jsonl: {len(examples):,} examples")


if __name__ == "__main__":
    main()
