"""Launched by federation/test_two_processes.py in several processes: metrics of generated text, one file of results for each."""

import argparse
import json
import os
from pathlib import Path

from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedbiot_trainer import FedBiOTConfig
from fedbiot_trainer.evaluation.passes import complete
from fedbiot_trainer.evaluation.text_metric import TextMetric


# Tells the order of the predictions and the process that computes.
MODULE = """
import os
import zlib

import datasets
import evaluate


class Order(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        both = "|".join([*predictions, *references])
        return {"order": zlib.crc32(both.encode()), "length": len(predictions), "rank": int(os.environ.get("RANK", 0))}
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    module = options.folder / "order"
    if accelerator.is_main_process:
        module.mkdir(parents=True)
        (module / "order.py").write_text(MODULE)
    accelerator.wait_for_everyone()

    dataset = load_dataset("json", data_files=options.data, split="train")
    model, tokenizer = (kind.from_pretrained(options.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    completions = complete(model, dataset["prompt"][:], tokenizer, 2, 3, accelerator)
    results = {"completions": completions}
    for name in (str(module), "exact_match", "pass_at_k"):
        code = name == "pass_at_k"
        columns = {"prompt": ["def double(x):\n"] * 2, "entry_point": ["double"] * 2,
                   "test": ["def check(f):\n    assert f(2) == 4"] * 2}  # fmt: skip
        args = FedBiOTConfig(
            str(options.folder), eval_metric=name, eval_reference_column="test" if code else "completion", use_cpu=True
        )
        metric = TextMetric(args, dataset.from_dict(columns) if code else dataset)
        bodies = ["    return 2 * x\nprint(", "    return x"]
        results[Path(name).name] = metric.compute(bodies if code else completions, accelerator)
    (options.folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
