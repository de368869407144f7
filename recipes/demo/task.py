"""
The text of the demo, made by code: a public corpus and three private domains.

Every example asks for one value (a sum, a difference, the larger number, a reversed list, ...) and states it in some
form. The public corpus has many wordings and many forms, and its prompts tell which form is wanted. The private
prompts ask for the same skills in each client's own wording, and want that client's house form. No public example
contains it and no private prompt describes it: it can only be learned from the client's completions.

One example in ten is held out by the hash of its skill and operands, and the rule is the same everywhere: no held-out
operands appear in public training text or in a client's training set, in whatever wording.
"""

import random
import zlib
from typing import NamedTuple

from datasets import Dataset


class Item(NamedTuple):
    """One question without its form: `key` names the skill and operands, `noun` is what is counted (or `""`)."""

    skill: str
    key: str
    question: str
    value: str
    noun: str = ""


NAMES = "ann ben cara dan eva finn gus hana ivo jill kai lena max nina oli pam quin rosa sam tess uma vic".split()
ROLES = "the cook|the pilot|the guard|the nurse|the clerk|the baker|a friend|my aunt|the team|someone".split("|")
NOUNS = (
    "apples books cards coins cups dolls eggs figs forms hats jars keys lamps maps masks nuts pens pills plums ropes "
    "seeds shirts socks stamps tapes tins toys vials"
).split()
PLACES = "box shop barn ward hall desk yard ship van store room shelf bag town".split()
WORDS = "red dog sky tree fish moon star rain door bird leaf hill boat wind gold lake rose bear salt milk".split()

STARTS = (
    "{n} has {a} {x}|there are {a} {x} in the {p}|the {p} holds {a} {x}|{a} {x} in the {p}|{n}: {a} {x}|"
    "at first {a} {x}|{n} sees {a} {x}|we count {a} {x}|{x} in the {p}: {a}|{p} {x} {a}|{n} starts with {a}|"
    "we had {a} {x}|{x}: {a}"
).split("|")
GAINS = (
    "{m} brings {b} more|{b} more arrive|{b} come in|then {b} are added|{m} adds {b} {x}|{n} gets {b}|plus {b} {x}|"
    "{b} new {x}|{n} finds {b} more|in: {b}|{m} gives {b} to {n}|another {b}|{m} puts in {b}|{b} extra|added {b}"
).split("|")
LOSSES = (
    "{m} takes {b}|{b} are sold|{b} go out|then {b} are lost|{m} uses {b} {x}|{n} gives {b} away|minus {b} {x}|"
    "{b} used|{n} loses {b}|out: {b}|{m} removes {b}|{b} less|without {b}|{b} leave|{n} eats {b}|taken {b}"
).split("|")
ENDS = "how many {x} now?|total?|how many?|what is the count?|{x} now?|result?|how many {x}?|count?|now?".split("|")
LEADS = "note|today|task|log|story|in the {p}|hello|{n} asks|{p} log|on monday|question|quick".split("|")

ADD_FRAMES = "{a} + {b}|{a} plus {b}|add {a} and {b}|sum of {a} and {b}|{a} and {b} more|{b} added to {a}".split("|")
SUB_FRAMES = "{a} - {b}|{a} minus {b}|take {b} from {a}|{b} less than {a}|{a} without {b}|{a} take away {b}".split("|")
NEXT_FRAMES = "what is next: {l}?|{l}, next?|{l} and then?|go on: {l}|{n} counts {l}. next?|continue {l}".split("|")
PICK_FRAMES = (
    "{w} of {l}|which is {w}: {l}?|{n} sees {l}. {w}?|pick the {w} from {l}|{l}, {w}?|{w}: {l}|"
    "what is the {w} of {l}?|{l} in the {p}. the {w} one?|{n} writes {l}, wants the {w}|from {l} take the {w}|"
    "{x} {l}. {w}?"
).split("|")
PICK_WORDS = {
    "larger": "larger bigger greater max highest most largest".split(),
    "smaller": "smaller lower less min lowest least smallest".split(),
    "first": "first start|first one|first item|opening".split("|"),
    "last": "last|last one|last item|end|final".split("|"),
    "count": "count|number of items|how many|length|size".split("|"),
    "copy": "copy|repeat|same|echo".split("|"),
    "reverse": "reverse|backwards|turned around|from the end".split("|"),
    "sort": "sort|in order|sorted|small to large".split("|"),
}
SKILL_WEIGHTS = {
    "add": 7, "sub": 7, "next": 2, "larger": 3, "smaller": 3, "sort": 2, "reverse": 2, "copy": 1, "first": 1,
    "last": 1, "count": 1,
}  # fmt: skip

NAMED_FORMS = {
    "plain": "#", "brackets": "[#]", "round": "(#)", "sentence": "The answer is #.", "equals": "= #", "option": "A) #",
    "loud": "# !", "result": "result: #", "quotes": '"#"', "arrow": "-> #", "list": "1. #", "unit": "# {x}",
}  # fmt: skip
FORM_PARTS = (
    "it is|so|we get|value|final|ok|ok.|done|here|yes|out|num|got|:|;|-|--|/|/ /|=|==|( )|[ ]|{ }|< >|* *|** **|( ]|"
    "[ )|| the|sum|end|.|,|!|?|answer|this|line|no|at|~|&|+|%|@|_ _|a|b)|x:|must be|is|then|and|for you|sir|of course"
).split("|")

# What the clients write; neither these forms nor these sentences occur in the public corpus. The number stands alone,
# as it does there: the layers below the adapter layers stay frozen, and compute it at the space in front of it.
HOUSE_FORMS = {"clinic": " < # ml", "shop": " $ # paid", "library": " { # due"}
PRIVATE_NOUNS = {
    "clinic": "pills masks vials tapes cups".split(),
    "shop": "shirts hats socks toys jars".split(),
    "library": "books maps cards forms pens".split(),
}
PRIVATE_FRAMES = {
    "clinic": {
        "add": [
            "nurse log: {x} on the ward {a}, {m} brings another {b}. {x} now?",
            "the ward has {a} {x}. then {m} puts in {b} more, count?",
        ],
        "sub": [
            "nurse log: {x} on the ward {a}, {m} uses {b}. {x} now?",
            "the ward has {a} {x}. then {m} takes out {b}, count?",
        ],
        "larger": ["{m} on the ward writes {l}. pick the highest?"],
    },
    "shop": {
        "add": [
            "the shop counts {a} {x}; a van brings {b} more {x}. result?",
            "{x} in the store {a}; added {b} today. total?",
        ],
        "sub": ["the shop counts {a} {x}; {m} takes {b} {x}. result?", "{x} in the store {a}; {b} sold today. total?"],
        "smaller": ["{m} at the shop sees {x} at {l}, wants the lowest"],
    },
    "library": {
        "add": ["shelf of {m}: {a} {x} and {b} new {x} come in. how many?"],
        "sub": [
            "shelf of {m}: {a} {x} and {b} {x} go out. how many?",
            "{m} had {a} {x} on the shelf, {b} are lost. count?",
        ],
        "larger": ["{x} of {m}: {l}. which is the bigger?"],
        "next": ["{m} counts {x} on the shelf: {l} and next?"],
    },
}  # fmt: skip


def is_held_out(key: str) -> bool:
    """Whether the skill and operands named by `key` are kept for evaluation (one key in ten)."""
    return zlib.crc32(key.encode()) % 10 == 0


def _nonsense(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 2))]
    return "".join(syllables) + rng.choice("bdgklmnprst")


def _pick(rng: random.Random, words: list[str]) -> str:
    # Made-up words teach the base that names and things do not change a sum.
    return _nonsense(rng) if rng.random() < 0.15 else rng.choice(words)


def _slots(rng: random.Random) -> dict[str, str]:
    return {
        "n": _pick(rng, NAMES + ROLES),
        "m": _pick(rng, NAMES + ROLES),
        "x": _pick(rng, NOUNS),
        "p": _pick(rng, PLACES),
    }


def _operands(rng: random.Random, skill: str) -> tuple[list, str]:
    """Draws what a question is about, and its value."""
    if skill == "add":
        total = rng.randint(1, 99)
        a = rng.randint(0, total)
        return [a, total - a], str(total)
    if skill == "sub":
        a = rng.randint(1, 99)
        b = rng.randint(0, a)
        return [a, b], str(a - b)
    if skill == "next":
        step = rng.randint(1, 12)
        first = rng.randint(0, 99 - 3 * step)
        return [first + i * step for i in range(3)], str(first + 3 * step)
    if skill in ("larger", "smaller", "sort"):
        numbers = rng.sample(range(100), 3 if skill == "sort" else rng.choice([2, 2, 3]))
        if skill == "sort":
            return numbers, " ".join(map(str, sorted(numbers)))
        return numbers, str(max(numbers) if skill == "larger" else min(numbers))
    size = rng.randint(2, 6 if skill == "count" else 4)
    items = [rng.choice(WORDS) if rng.random() < 0.6 else str(rng.randint(0, 99)) for _ in range(size)]
    value = {
        "first": items[0],
        "last": items[-1],
        "count": str(size),
        "copy": " ".join(items),
        "reverse": " ".join(items[::-1]),
    }
    return items, value[skill]


def _key(skill: str, operands: list) -> str:
    ordered = sorted(operands) if skill in ("add", "larger", "smaller", "sort") else operands
    return skill + ":" + ",".join(map(str, ordered))


def _draw(rng: random.Random, skill: str, held_out: bool) -> tuple[list, str, str]:
    while True:
        operands, value = _operands(rng, skill)
        key = _key(skill, operands)
        if is_held_out(key) == held_out:
            return operands, value, key


def _public_item(rng: random.Random, held_out: bool, short: bool) -> Item:
    skill = rng.choices(list(SKILL_WEIGHTS), list(SKILL_WEIGHTS.values()))[0]
    operands, value, key = _draw(rng, skill, held_out)
    slots = _slots(rng)
    noun = ""
    if skill in ("add", "sub"):
        slots |= {"a": operands[0], "b": operands[1]}
        if short or rng.random() < 0.25:
            frame = rng.choice(ADD_FRAMES if skill == "add" else SUB_FRAMES)
        else:
            change = rng.choice(GAINS if skill == "add" else LOSSES)
            frame = rng.choice(STARTS) + rng.choice([". ", ", ", "; ", " and "]) + change
            frame += rng.choice([". ", ", ", "; "]) + rng.choice(ENDS)
            noun = slots["x"]
    else:
        separator = rng.choice([", ", " ", " and "] if len(operands) == 2 else [", ", " ", "; "])
        slots["l"] = separator.join(map(str, operands))
        slots["w"] = rng.choice(PICK_WORDS.get(skill, [""]))
        frames = NEXT_FRAMES if skill == "next" else PICK_FRAMES
        frame = frames[1] if short else rng.choice(frames)
    if not short and rng.random() < 0.3:
        frame = rng.choice(LEADS) + ": " + frame
    return Item(skill, key, frame.format(**slots), value, noun)


def _random_form(rng: random.Random) -> str:
    """Builds a form such as `so we get (#) ok`, nearly always one that was never seen before."""
    before = [_pick(rng, FORM_PARTS) for _ in range(rng.randint(0, 2))]
    after = [_pick(rng, FORM_PARTS) for _ in range(rng.randint(0, 1))]
    middle = rng.choice(["#", "#", "(#)", "<#>", "[#", "*#*", "#.", "/#", "{#}", "|#|", "$#"])
    return " ".join(" ".join([*before, middle, *after]).split())


def _public_example(rng: random.Random, held_out: bool, short_share: float) -> dict[str, str]:
    short = rng.random() < short_share
    item = _public_item(rng, held_out, short)
    kind = 0.0 if short else rng.random()
    question, opening = item.question, ""
    if kind < 0.35:  # no form named: the bare value
        form = "#"
    elif kind < 0.55:  # a form named by a cue word
        cue = rng.choice([name for name in NAMED_FORMS if item.noun or name != "unit"])
        form = NAMED_FORMS[cue].format(x=item.noun)
        question = rng.choice([f"{cue}: {question}", f"{question} ({cue})", f"{question} as {cue}"])
    else:
        form = _random_form(rng)
        if kind < 0.75:  # a form shown in the prompt
            question = rng.choice([f"{question} like {form}", f"like {form}: {question}"])
        else:  # the prompt has already begun the answer
            opening, form = form.split("#")[0].rstrip(), "#"
            opening = f" {opening}" if opening else ""
    return {
        "prompt": f"{question}\nA:{opening}",
        "completion": " " + form.replace("#", item.value),
        "skill": item.skill,
    }


def public_corpus(num_examples: int, seed: int, held_out: bool = False) -> Dataset:
    """
    Makes the public text.

    Args:
        num_examples (`int`):
            Number of examples.
        seed (`int`):
            The same seed gives the same text.
        held_out (`bool`, *optional*, defaults to `False`):
            Draw the operands from those that are kept for evaluation.

    Returns:
        `Dataset` with the columns `prompt` and `completion`.
    """
    return Dataset.from_list(public_examples(num_examples, seed, held_out)).remove_columns("skill")


def public_examples(
    num_examples: int, seed: int, held_out: bool = False, short_share: float = 0.0
) -> list[dict[str, str]]:
    """
    Makes the rows of [`public_corpus`], each with the name of its `skill` besides.

    A share `short_share` of them is made to be as short as can be, for the first steps of pre-training.
    """
    rng = random.Random(f"public-{seed}-{held_out}")
    return [_public_example(rng, held_out, short_share) for _ in range(num_examples)]


def _private_example(rng: random.Random, client: str, held_out: bool) -> dict[str, str]:
    frames = PRIVATE_FRAMES[client]
    skill = rng.choices(list(frames), [3 if skill in ("add", "sub") else 1 for skill in frames])[0]
    operands, value, _ = _draw(rng, skill, held_out)
    slots = {"m": rng.choice(NAMES), "x": rng.choice(PRIVATE_NOUNS[client]), "a": operands[0], "b": operands[1]}
    question = rng.choice(frames[skill]).format(l=", ".join(map(str, operands)), **slots)
    # A client names itself where a public prompt may name the form.
    return {"prompt": f"{question} ({client})\nA:", "completion": HOUSE_FORMS[client].replace("#", value)}


def private_domains(
    num_train: int | dict[str, int] = 450, num_eval: int = 300, seed: int = 0
) -> tuple[dict[str, Dataset], Dataset]:
    """
    Makes what the three clients hold, and the text on which the result is judged.

    Args:
        num_train (`int` or `dict[str, int]`, *optional*, defaults to `450`):
            Number of training examples of each client.
        num_eval (`int`, *optional*, defaults to `300`):
            Number of held-out examples, the same share for each client.
        seed (`int`, *optional*, defaults to `0`):
            The same seed gives the same text.

    Returns:
        `tuple` of the training sets by client (columns `prompt` and `completion`) and the held-out set (columns
        `prompt`, `completion` and `client`). No prompt occurs twice.
    """
    train, held_out = {}, []
    seen: set[str] = set()
    for client in HOUSE_FORMS:
        size = num_train[client] if isinstance(num_train, dict) else num_train
        rng = random.Random(f"private-{client}-{seed}")
        train[client] = Dataset.from_list(_distinct(rng, client, False, size, seen))
        rows = _distinct(rng, client, True, num_eval // len(HOUSE_FORMS), seen)
        held_out += [row | {"client": client} for row in rows]
    return train, Dataset.from_list(held_out)


def _distinct(rng: random.Random, client: str, held_out: bool, size: int, seen: set[str]) -> list[dict[str, str]]:
    rows = []
    while len(rows) < size:
        row = _private_example(rng, client, held_out)
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            rows.append(row)
    return rows
