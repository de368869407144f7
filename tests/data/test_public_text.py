from collections import Counter
from types import SimpleNamespace

import pytest
from datasets import Dataset

from fedbiot_trainer.cli.early import check_early
from fedbiot_trainer.data.public_sources import PublicSource, public_sources
from fedbiot_trainer.data.public_text import read_public


QA = ("Question: {question}\nAnswer:", " {answer}")
NONE = (None, None)


def arguments(names, **changes):
    settings = {"public_fractions": None, "public_dataset_config": None, "public_dataset_split": "train"}
    settings |= {"public_prompt_template": None, "public_completion_template": None}
    return SimpleNamespace(public_dataset_name=names, **settings | changes)


@pytest.fixture
def file(tmp_path):
    def make(name, rows=10, **columns):
        made = {column: [f"{name} {column} {i}" for i in range(rows)] for column in columns.pop("columns", ())}
        Dataset.from_dict(made | columns).to_json(tmp_path / f"{name}.jsonl")
        return str(tmp_path / f"{name}.jsonl")

    return make


def read(*paths, templates=QA, chat=False, limit=None, seed=0, **changes):
    sources = [path if isinstance(path, PublicSource) else PublicSource(path, **changes) for path in paths]
    return read_public(sources, templates, chat, limit, seed)


# ---- which sets, in what shares


def test_names_and_mappings():
    assert public_sources(arguments(None)) == []
    assert public_sources(arguments("a")) == public_sources(arguments(["a"])) == [PublicSource("a")]
    given = [
        "a",
        {"path": "b", "split": "test", "prompt_template": "{x}", "completion_template": "{y}", "fraction": 2},
    ]
    for_all = {"public_prompt_template": "{p}", "public_completion_template": "{c}", "public_dataset_config": "main"}
    with pytest.raises(ValueError, match="has a `fraction` for some sets, but none for a. Give each one, or none"):
        public_sources(arguments(given, **for_all))
    del given[1]["fraction"]
    assert public_sources(arguments(given, public_fractions=[1, 3], **for_all)) == [
        PublicSource("a", "main", "train", 1, "{p}", "{c}"),
        PublicSource("b", "main", "test", 3, "{x}", "{y}"),
    ]


@pytest.mark.parametrize(
    "names, fractions, message",
    [
        (["a", "b"], [0.5], "`public_fractions` has 1 numbers, but `public_dataset_name` has 2 sets. Give one for each"),
        (None, [0.5], "`public_fractions` has 1 numbers, but `public_dataset_name` has 0 sets"),
        (["a", "b"], [1, 0], "The fraction of 'b' in the public text is 0, but a share must be a positive number"),
        (["a", "b"], [1, float("inf")], "The fraction of 'b' in the public text is inf"),
        ([{"path": "a", "fraction": "half"}], None, "The fraction of 'a' in the public text is 'half'"),
        ([{"path": "a", "fraction": 1}], [1], "`public_fractions` is .1., but .* has a `fraction` of its own"),
        ([{"path": "a", "weight": 1}], None, "has {'path': 'a', 'weight': 1}, but a set is a name, or .* a mapping with"),
        ([{"name": "a"}], None, "has {'name': 'a'}, but a set is a name, or in a YAML a mapping with a `path`"),
        ([3], None, "`public_dataset_name` has 3, but a set is a name"),
        ([{"path": "a", "prompt_template": "{x}"}], None, "of 'a' in `public_dataset_name` belong together"),
        ([{"path": "a", "prompt_template": "{x", "completion_template": ""}], None, "`prompt_template` of 'a' in .* no templ"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be(names, fractions, message):
    with pytest.raises(ValueError, match=message):
        public_sources(arguments(names, public_fractions=fractions))


def test_found_in_the_first_second(tmp_path, file):
    there = file("a", columns=["text"])
    flags = ["--model_name_or_path", "org/m", "--client_datasets", "a=org/a", "--public_dataset_name", there]
    check_early([*flags, "org/b", "--public_fractions", "1", "2.5"])
    with pytest.raises(FileNotFoundError, match="There is no file './gone.jsonl'"):
        check_early([*flags, "./gone.jsonl"])
    with pytest.raises(ValueError, match="`public_fractions` has 1 numbers"):
        check_early([*flags, "org/b", "--public_fractions", "1"])
    config = tmp_path / "run.yaml"
    config.write_text("public_dataset_name: [{path: org/a, share: 1}]\n")
    with pytest.raises(ValueError, match="a mapping with a `path` and any of name, split, fraction"):
        check_early([*flags[:4], "--config", str(config)])


# ---- the clients' form


def test_clients_templates_where_the_columns_fit(file):
    near, far = file("near", columns=["question", "answer"]), file("far", columns=["text"])
    public, lines = read(near)
    assert public[3]["prompt"] == "Question: near question 3\nAnswer:"
    assert public[3]["completion"] == " near answer 3"
    assert lines == [f"public text: 10 examples of {near}, in the clients' form: `prompt_template` fits its columns"]
    public, lines = read(far)
    assert public.column_names == ["text"]
    assert lines == [
        f"public text: 10 examples of {far}, not in the clients' form: it has no column question, answer (`prompt_template`)"
    ]
    assert read(near, templates=NONE)[1] == []


def test_own_templates_come_first(file):
    near = file("near", columns=["question", "answer"])
    public, lines = read(near, prompt_template="{answer}", completion_template="{question}")
    assert public[0]["prompt"] == "near answer 0" and lines == []
    with pytest.raises(ValueError, match="`public_prompt_template` is '{x}', but .*near.jsonl' has no column x"):
        read(near, prompt_template="{x}", completion_template="{answer}")


def test_prompts_become_messages_where_the_clients_chat(file):
    pairs, text = file("pairs", columns=["question", "answer"]), file("text", columns=["text"])
    own = {"prompt_template": "{question}", "completion_template": "{answer}"}
    public, lines = read(pairs, templates=NONE, chat=True, **own)
    assert public[0]["prompt"] == [{"role": "user", "content": "pairs question 0"}]
    assert public[0]["completion"] == [{"role": "assistant", "content": "pairs answer 0"}]
    assert lines[0].endswith("in the clients' form: its prompts and completions became messages")
    assert read(text, templates=NONE, chat=True)[1][0].endswith("form: it is plain text, theirs is conversations")
    messages = file("messages", messages=[[{"role": "user", "content": "hi"}]])
    public, lines = read(messages, templates=NONE, chat=True)
    assert public[0]["messages"][0]["content"] == "hi" and lines == []
    assert read(messages, templates=NONE)[1][0].endswith("form: it is conversations, theirs is plain text")


# ---- mixtures


def sources_of(public):
    return Counter(text.split()[0] for text in public["completion"])


def test_mixture_keeps_its_fractions_and_takes_no_row_twice(file):
    one, two = (file(name, rows, columns=["question", "answer"]) for name, rows in (("one", 40), ("two", 12)))
    public, lines = read(one, two)
    assert sources_of(public) == {"one": 40, "two": 12}
    mixed = [PublicSource(path, fraction=fraction) for path, fraction in ((one, 3), (two, 1))]
    public, lines = read(*mixed)
    assert sources_of(public) == {"one": 36, "two": 12} and len(set(public["completion"])) == 48
    assert lines[0].startswith(f"public text: 36 of 40 examples of {one}, in the clients' form")
    assert lines[1].startswith(f"public text: 12 examples of {two}")
    assert read(*mixed)[0].to_list() == public.to_list() != read(*mixed, seed=1)[0].to_list()
    public, _ = read(*mixed, limit=20)
    assert sources_of(public) == {"one": 15, "two": 5}
    assert sources_of(read(one, two, limit=26)[0]) == {"one": 20, "two": 6}
    halves = [PublicSource(path, fraction=1) for path in (one, two)]
    assert [len(read(*halves, limit=limit)[0]) for limit in (3, 7, 11)] == [3, 7, 11]
    with pytest.raises(ValueError, match="would have no example of '.*two.jsonl', whose share of 2 is 0.23. Raise"):
        read(one, two, limit=2)


def test_plain_text_joins_prompts_and_completions(file, tokenizer, make_alignment):
    one, two = file("one", columns=["question", "answer"]), file("two", columns=["text", "title"])
    public, _ = read(one, two)
    assert public.column_names == ["prompt", "completion"]
    assert public[10] == {"prompt": "", "completion": "two text 0"}
    tokens = make_alignment(public, max_length=16).train_dataset  # TRL can tokenize it
    alone = make_alignment(Dataset.from_dict({"text": ["two text 0"]}), max_length=16).train_dataset
    assert tokens[10]["input_ids"] == alone[0]["input_ids"]


def test_forms_that_do_not_mix(file):
    one = file("one", columns=["text"])
    two = file("two", messages=[[{"role": "user", "content": "hi"}]])
    with pytest.raises(
        ValueError, match="mixes forms .*: '.*one.jsonl' has text; '.*two.jsonl' has messages .messages"
    ):
        read(one, two, templates=NONE)
    with pytest.raises(
        ValueError, match="`public_dataset_name` .'.*three.jsonl'. has the columns a, but it needs `text`"
    ):
        read(one, file("three", columns=["a"]), templates=NONE)
