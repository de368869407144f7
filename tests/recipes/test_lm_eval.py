import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import save_result, sums, tiny_model, trained
from datasets import Dataset

from fedbiot_trainer.cli import train
from fedbiot_trainer.cli.merge import merge
from fedbiot_trainer.evaluation.passes import complete


pytestmark = pytest.mark.trains


DEMO = Path(__file__).parents[2] / "recipes" / "demo"
TASK = """
tag: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: test.jsonl
test_split: test
doc_to_text: "{{prompt}}"
target_delimiter: ""
"""
GENERATE = """
task: sums_exact_match
doc_to_target: "{{completion | trim}}"
output_type: generate_until
generation_kwargs: {until: [], max_gen_toks: 6}
filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
"""
SCORE = """
task: sums_loglikelihood
doc_to_target: "{{completion}}<eos>"
output_type: loglikelihood
metric_list: [{metric: perplexity}, {metric: acc}]
"""
SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

jobs, found = json.load(open("jobs.json")), {}
for name, job in jobs.items():
    tasks = TaskManager(include_path=job["include_path"], include_defaults=False)
    output = simple_evaluate(
        "hf", job["model_args"], [job["task"]], batch_size=4, device="cpu", bootstrap_iters=0, limit=job.get("limit"),
        task_manager=tasks,
    )
    answers = {
        sample["doc"]["prompt"]: sample["filtered_resps"][0]
        for sample in output["samples"][job["task"] + "_exact_match"]
    }
    found[name] = {"results": output["results"], "answers": answers}
assert "fedbiot_trainer" not in sys.modules
json.dump(found, open("found.json", "w"))
"""


def answers_of(model, prompts, tokenizer):
    """What the model says, prompt by prompt."""
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, eos_token_id=1
        )
        answers.append(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True).strip())
    return answers


@torch.no_grad()
def loglikelihoods(model, dataset, tokenizer):
    values = []
    for row in dataset:
        start, text = (
            tokenizer(text).input_ids for text in (row["prompt"], "{prompt}{completion}<eos>".format(**row))
        )
        scores = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        values.append(sum(scores[i - 1, text[i]].item() for i in range(len(start), len(text))))
    return values


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tokenizer):
    """The results of lm_eval on what a run leaves, and the models in this library with the same text."""
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: `pip install -e ".[lm-eval]"`')
    folder = tmp_path_factory.mktemp("lm_eval")
    base = tiny_model(vocab_size=len(tokenizer))  # with `peft=`, lm_eval cuts the embeddings to the tokenizer's length
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    models, package = trained(base)
    package.save(folder / "emulator_package", tokenizer)
    save_result(models, package, folder / "client_lora", str(folder / "base"))
    merge(folder / "emulator_package", folder / "adap_emu")
    merge(folder / "client_lora", folder / "adap_fu")

    ours = {"adap_emu": models.adap_emu.eval(), "adap_fu": models.adap_fu.eval()}
    prompts = sums(0, 8)["prompt"]
    answers = {name: answers_of(model, prompts, tokenizer) for name, model in ours.items()}
    assert all(emu != fu for emu, fu in zip(*answers.values(), strict=True))
    # AdapEmu is right in half of the prompts, AdapFu in a quarter, and nobody in the others.
    right = [["adap_emu", "adap_fu", "adap_emu", None][i % 4] for i in range(len(prompts))]
    completions = ["7" if name is None else answers[name][i] for i, name in enumerate(right)]
    dataset = Dataset.from_dict({"prompt": prompts, "completion": completions})

    dataset.to_json(folder / "test.jsonl")
    (folder / "tasks").mkdir()
    for name, task in {"generate": GENERATE, "score": SCORE}.items():
        (folder / "tasks" / f"{name}.yaml").write_text(TASK + task)
    arguments = {
        "adap_emu": "pretrained=adap_emu",
        "adap_fu": "pretrained=base,peft=client_lora",
        "adap_fu merged": "pretrained=adap_fu",
    }
    jobs = {name: {"model_args": value, "task": "sums", "include_path": "tasks"} for name, value in arguments.items()}
    demo = f"pretrained={DEMO / 'base'},dtype=float32"
    jobs["demo"] = {"model_args": demo, "task": "fedbiot_demo", "include_path": str(DEMO / "lm_eval"), "limit": 8}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, cwd=folder)
    return json.loads((folder / "found.json").read_text()), ours, dataset


@pytest.mark.parametrize("name, share", [("adap_emu", 0.5), ("adap_fu", 0.25), ("adap_fu merged", 0.25)])
def test_results_are_our_own(evaluated, tokenizer, name, share):
    found, ours, dataset = evaluated
    model = ours[name.removesuffix(" merged")]
    generation, scores = (found[name]["results"][f"sums_{task}"] for task in ("exact_match", "loglikelihood"))
    own = complete(model, dataset["prompt"][:], tokenizer, 4, 6, Accelerator(cpu=True))
    right = [text.strip() == reference.strip() for text, reference in zip(own, dataset["completion"], strict=True)]
    assert generation["exact_match,strip"] == sum(right) / len(right) == share
    assert list(found[name]["answers"].values()) == answers_of(model, dataset["prompt"], tokenizer)
    mean = sum(loglikelihoods(model, dataset, tokenizer)) / len(dataset)
    assert math.log(scores["perplexity,none"]) == pytest.approx(-mean, rel=1e-4)


def test_tasks_of_the_demo_run(evaluated):
    found, _, _ = evaluated
    results = found["demo"]["results"]
    assert results["fedbiot_demo_exact_match"]["exact_match,strip"] == 0
    assert results["fedbiot_demo_loglikelihood"]["perplexity,none"] > 1
    assert len(found["demo"]["answers"]) == 8


def test_text_is_what_the_demo_is_evaluated_on(make_args):
    arguments = train.FederatedScriptArguments(task="demo")
    held_out = runpy.run_path(str(DEMO / "lm_eval" / "held_out.py"))["held_out"]
    for seed in (0, 1):
        expected = train.load_datasets(arguments, make_args(seed=seed))["eval_dataset"]
        assert held_out(seed=seed)["test"].to_list() == expected.to_list()
