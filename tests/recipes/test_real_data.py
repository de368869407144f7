import os
from pathlib import Path

import pytest
from conftest import tiny_model
from datasets import load_dataset
from peft import LoraConfig
from test_prepare import check_no_text_on_two_sides, run_prepare


DATA = Path(os.environ.get("FEDBIOT_DATA", ""))

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(
        not (DATA / "gsm8k_train.jsonl").exists(),
        reason="FEDBIOT_DATA names no folder with gsm8k_train.jsonl, gsm8k_test.jsonl and codealpaca.jsonl",
    ),
]


def read(name, prompt, completion, limit):
    dataset = load_dataset("json", data_files=str(DATA / f"{name}.jsonl"), split="train").select(range(limit))
    return dataset.map(
        lambda row: {"prompt": prompt.format(**row), "completion": completion.format(**row)},
        remove_columns=dataset.column_names,
    )


@pytest.mark.slow
def test_gsm8k_with_codealpaca_as_public_text(make_runner):
    """Real text through the whole loop, by characters: the loss on held-out problems falls."""
    runner = make_runner(
        model=tiny_model(max_position_embeddings=512, initializer_range=0.05),
        train_dataset=read("gsm8k_train", "{question}", " {answer}", 60),
        eval_dataset=read("gsm8k_test", "{question}", " {answer}", 10),
        public_dataset=read("codealpaca", "{instruction}", " {output}", 40),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        num_rounds=3,
        local_steps=8,
        max_length=512,
    )
    summary = runner.train()
    assert summary.adap_fu["loss"] < summary.zero_shot["loss"] - 0.15
    assert summary.num_examples == {"client-0": 20, "client-1": 20, "client-2": 20}


@pytest.mark.skipif(not (DATA / "HumanEval.jsonl.gz").exists(), reason="FEDBIOT_DATA has no HumanEval.jsonl.gz")
def test_code_by_language(monkeypatch, tmp_path):
    flags = {"instructions": "codealpaca.jsonl", "more_public": "gsm8k_train.jsonl", "humaneval": "HumanEval.jsonl.gz"}
    pairs = [(f"--{flag}", DATA / name) for flag, name in flags.items()]
    files = run_prepare(monkeypatch, tmp_path, *(item for pair in pairs for item in pair))
    assert {name: len(rows) for name, rows in files.items()} == {
        "clients/cpp": 716,
        "clients/java": 537,
        "clients/javascript": 849,
        "clients/python": 1042,
        "eval": 120,
        "public": 8488,
        "humaneval": 164,
    }
    check_no_text_on_two_sides(files)
    problem = files["humaneval"][0]
    exec(problem["prompt"] + problem["completion"] + problem["test"] + f"\ncheck({problem['entry_point']})", {})
