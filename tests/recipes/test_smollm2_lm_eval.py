import copy
import json
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import save_result, tiny_model, trained
from datasets import Dataset
from tokenizers import decoders

from fedbiot_trainer.cli.merge import merge
from fedbiot_trainer.evaluation.passes import complete
from fedbiot_trainer.evaluation.text_metric import METRICS


pytestmark = pytest.mark.trains

FOLDER = Path(__file__).parents[2] / "recipes" / "smollm2"
MODULES = {"svamp": FOLDER / "expression_accuracy", "xquad": METRICS / "exact_match"}
PROMPTS = [f"question: {name} has {number}. answer:" for name in ("ann", "bob", "maria", "li") for number in (3, 7)]
SCRIPT = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

tasks, found = TaskManager(include_path=sys.argv[1], include_defaults=False), {}
for name, arguments in json.load(open("models.json")).items():
    output = simple_evaluate(
        "hf", arguments, ["fedbiot_svamp", "fedbiot_xquad"], batch_size=4, device="cpu", bootstrap_iters=0,
        task_manager=tasks,
    )
    answers = {
        task: {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in samples}
        for task, samples in output["samples"].items()
    }
    found[name] = {"results": output["results"], "answers": answers}
assert "fedbiot_trainer" not in sys.modules
json.dump(found, open("found.json", "w"))
"""


def settings(task):
    """The recipe's own evaluation, and what lm_eval is told."""
    texts = [(folder / f"{task}.yaml").read_text() for folder in (FOLDER, FOLDER / "lm_eval")]
    return [yaml.load(text.replace("!function ", ""), yaml.BaseLoader) for text in texts]


def answers_of(model, tokenizer, task):
    limit = int(settings(task)[0]["eval_max_new_tokens"])
    return complete(model, PROMPTS, tokenizer, 4, limit, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tokenizer):
    """The results of lm_eval on a full model, AdapEmu and AdapFu that write numbers, and our own on the same text."""
    pytest.importorskip("lm_eval", reason='lm_eval is not installed: `pip install -e ".[lm-eval]"`')
    folder = tmp_path_factory.mktemp("smollm2_lm_eval")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # digits side by side are a number
    base = tiny_model(vocab_size=len(tokenizer))
    digits = torch.tensor([text in "123456789" for text in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])
    base.lm_head.weight.data[~digits] = 0
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    zero_shot = {task: answers_of(base, tokenizer, task) for task in MODULES}
    models, package = trained(base)
    package.save(folder / "emulator_package", tokenizer)
    save_result(models, package, folder / "client_lora", str(folder / "base"))
    merge(folder / "emulator_package", folder / "adap_emu")

    own = {"zero_shot": zero_shot}
    for name, model in {"adap_emu": models.adap_emu, "adap_fu": models.adap_fu}.items():
        own[name] = {task: answers_of(model, tokenizer, task) for task in MODULES}
    # In turn one of the three is right.
    rows = {
        task: [
            {"prompt": prompt, "completion": " " + own[list(own)[i % 3]][task][i] + ("+0" if task == "svamp" else "")}
            for i, prompt in enumerate(PROMPTS)
        ]
        for task in MODULES
    }
    for task, examples in rows.items():
        Dataset.from_list(examples).to_json(folder / "outputs" / "smollm2" / task / "eval.jsonl")
    arguments = {
        "zero_shot": "pretrained=base",
        "adap_emu": "pretrained=adap_emu",
        "adap_fu": "pretrained=base,peft=client_lora",
    }
    (folder / "models.json").write_text(json.dumps(arguments))
    subprocess.run([sys.executable, "-c", SCRIPT, FOLDER / "lm_eval"], check=True, cwd=folder)
    return json.loads((folder / "found.json").read_text()), own, rows


@pytest.mark.parametrize("task, metric", [("svamp", "expression_accuracy,none"), ("xquad", "exact_match,strip")])
@pytest.mark.parametrize("name", ["zero_shot", "adap_emu", "adap_fu"])
def test_results_are_our_own(evaluated, name, task, metric):
    found, own, rows = evaluated
    answers = own[name][task]
    assert found[name]["answers"][f"fedbiot_{task}"] == dict(zip(PROMPTS, answers, strict=True))
    module = evaluate.load(str(MODULES[task]), keep_in_memory=True)
    expected = module.compute(predictions=answers, references=[row["completion"] for row in rows[task]])
    result = found[name]["results"][f"fedbiot_{task}"][metric]
    assert 0 < result == expected[metric.split(",")[0]] < 1


@pytest.mark.parametrize("task", MODULES)
def test_settings_are_those_of_the_recipe(task):
    ours, theirs = settings(task)
    assert theirs["dataset_kwargs"]["data_files"]["test"] == ours["eval_dataset_name"]
    assert theirs["generation_kwargs"] == {"until": [], "max_gen_toks": ours["eval_max_new_tokens"]}
    assert Path(ours["eval_metric"]).name == theirs["metric_list"][0]["metric"] == MODULES[task].name
