"""
Federated fine-tuning without the full model (FedBiOT), from the command line.

Without arguments, the embedded demo (no network, a few minutes on a laptop):

    accelerate launch recipes/fedbiot_sft.py

With a recipe's YAML, any flag overriding it:

    accelerate launch recipes/fedbiot_sft.py --config recipes/gsm8k/llama2_7b.yaml --emulator_drop_ratio 0.2

With data of your own, one file per client:

    accelerate launch recipes/fedbiot_sft.py --model_name_or_path meta-llama/Llama-2-7b-hf \
        --client_datasets clinic-a=a.jsonl clinic-b=b.jsonl --public_dataset_name tatsu-lab/alpaca \
        --public_prompt_template "{instruction} {input}" --public_completion_template " {output}" --output_dir out
"""

import runpy
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from fedbiot_trainer import METHODS, FedBiOTConfig, run_method


RECIPES = Path(__file__).parent


@dataclass
class FederatedScriptArguments(ScriptArguments):
    """
    Where the texts come from. A dataset is a name on the Hub, a folder, or a file (.jsonl, .json, .csv, .parquet).

    `dataset_name` is the private training set, split among clients as `--partition` says, unless `client_datasets`
    gives each client its own.
    """

    task: str | None = field(
        default=None, metadata={"help": "Embedded task that brings its own data and model.", "choices": ["demo"]}
    )
    method: str = field(
        default="fedbiot",
        metadata={"help": "Method to run: a preset over the settings given.", "choices": list(METHODS)},
    )
    client_datasets: list[str] | None = field(
        default=None, metadata={"help": "Private training sets, NAME=DATASET for each client."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out set, if it is not the test split of dataset_name."}
    )
    public_dataset_name: str | None = field(default=None, metadata={"help": "Public set for the alignment."})
    public_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    public_dataset_split: str = field(default="train", metadata={"help": "Its split."})
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Makes the prompt of private examples, with columns in braces: 'Question: {question}'."},
    )
    completion_template: str | None = field(default=None, metadata={"help": "Makes their completion."})
    public_prompt_template: str | None = field(default=None, metadata={"help": "The same for public examples."})
    public_completion_template: str | None = field(default=None, metadata={"help": "The same for public examples."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many private examples at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out examples at most."})
    max_public_samples: int | None = field(default=None, metadata={"help": "Use this many public examples at most."})

    def __post_init__(self):
        for prompt, completion in (
            ("prompt_template", "completion_template"),
            ("public_prompt_template", "public_completion_template"),
        ):
            if (getattr(self, prompt) is None) != (getattr(self, completion) is None):
                raise ValueError(f"`{prompt}` and `{completion}` belong together: set both or neither.")
        if self.dataset_streaming:
            raise ValueError(
                "`dataset_streaming` is True, but a federated run needs to know where in the data a client is, which a "
                "stream cannot tell. Leave it out."
            )
        if self.task is None and (self.dataset_name is None) == (self.client_datasets is None):
            raise ValueError("Set one of `dataset_name` and `client_datasets`, or `task`.")


def load(name: str, config: str | None, split: str, templates: tuple, limit: int | None, seed: int) -> Dataset:
    """Load one dataset, draw `limit` examples and bring them into prompt-completion form if there are templates."""
    suffix = Path(name).suffix.lstrip(".")
    if suffix in ("json", "jsonl", "csv", "parquet"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file '{name}'.")
        dataset = load_dataset("json" if suffix == "jsonl" else suffix, data_files=name, split="train")
    else:
        dataset = load_dataset(name, config, split=split)
    if limit is not None and limit < len(dataset):
        dataset = dataset.shuffle(seed=seed).select(range(limit))
    prompt, completion = templates
    if prompt is not None:
        dataset = dataset.map(
            lambda row: {"prompt": prompt.format(**row), "completion": completion.format(**row)},
            desc=f"Formatting {Path(name).name}",
        )
    return dataset


def load_datasets(script_args: FederatedScriptArguments, seed: int) -> dict:
    """The dataset arguments of [`run_method`]."""
    if script_args.task == "demo":
        task = runpy.run_path(str(RECIPES / "demo" / "task.py"))
        client_datasets, eval_dataset = task["private_domains"](
            {"clinic": 300, "shop": 450, "library": 600}, seed=seed
        )
        return {
            "client_datasets": client_datasets,
            "public_dataset": task["public_corpus"](3000, seed=seed),
            "eval_dataset": eval_dataset,
        }

    private = (script_args.prompt_template, script_args.completion_template)
    public = (script_args.public_prompt_template, script_args.public_completion_template)
    split = script_args.dataset_train_split
    loaded = {}
    if script_args.client_datasets is not None:
        pairs = [item.partition("=")[::2] for item in script_args.client_datasets]
        if not all(name and dataset for name, dataset in pairs):
            raise ValueError(f"`client_datasets` must be NAME=DATASET each, got {script_args.client_datasets}.")
        loaded["client_datasets"] = [
            (name, load(path, None, split, private, script_args.max_train_samples, seed)) for name, path in pairs
        ]
    else:
        loaded["train_dataset"] = load(
            script_args.dataset_name, script_args.dataset_config, split, private, script_args.max_train_samples, seed
        )
    is_file = Path(script_args.dataset_name or "").is_file()
    eval_name = script_args.eval_dataset_name or (None if is_file else script_args.dataset_name)
    if eval_name is not None:
        loaded["eval_dataset"] = load(
            eval_name,
            script_args.dataset_config,
            script_args.dataset_test_split,
            private,
            script_args.max_eval_samples,
            seed,
        )
    if script_args.public_dataset_name is not None:
        loaded["public_dataset"] = load(
            script_args.public_dataset_name,
            script_args.public_dataset_config,
            script_args.public_dataset_split,
            public,
            script_args.max_public_samples,
            seed,
        )
    return loaded


def main(script_args: FederatedScriptArguments, training_args: FedBiOTConfig, model_args: ModelConfig):
    model_name = model_args.model_name_or_path
    if script_args.task is not None and model_name is None:
        model_name = str(RECIPES / script_args.task / "base")
    if model_name is None:
        raise ValueError(
            "`model_name_or_path` is not set. Name the full model, or run without arguments for the demo."
        )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(training_args.model_init_kwargs or {}),
    }
    peft_config = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )
    run_method(
        script_args.method,
        model=model_name,
        args=training_args,
        peft_config=peft_config,
        **load_datasets(script_args, training_args.seed),
    )


def make_parser() -> TrlParser:
    return TrlParser((FederatedScriptArguments, FedBiOTConfig, ModelConfig))


def with_default_config(argv: list[str]) -> list[str]:
    """The demo's YAML stands in where neither a YAML nor a model is named."""
    if {"--config", "--model_name_or_path", "--help", "-h"} & set(argv):
        return argv
    return ["--config", str(RECIPES / "demo" / "demo.yaml"), *argv]


if __name__ == "__main__":
    # Deprecations inside the libraries are not for the reader of this recipe's output.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch.distributed")
    main(*make_parser().parse_args_and_config(with_default_config(sys.argv[1:])))
