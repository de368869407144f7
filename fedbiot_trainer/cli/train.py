"""
Federated fine-tuning without the full model (FedBiOT), from the command line.

With a recipe's YAML, any flag overriding it:

    fedbiot train --config recipes/gsm8k/llama2_7b.yaml --emulator_drop_ratio 0.2

With data of your own, one file per client:

    accelerate launch -m fedbiot_trainer train --model_name_or_path meta-llama/Llama-2-7b-hf \\
        --client_datasets clinic-a=a.jsonl clinic-b=b.jsonl --public_dataset_name tatsu-lab/alpaca \\
        --public_prompt_template "{instruction} {input}" --public_completion_template " {output}" --output_dir out
"""

import runpy
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from ..config import FedBiOTConfig
from ..config.methods import METHODS
from ..data.names import has_splits
from ..data.partition import name_client_datasets
from ..data.public_sources import public_sources
from ..data.public_text import read_public
from ..data.sources import hold_out, keep_values, read_dataset, to_examples
from ..federation.costs import plan
from ..federation.interruption import RunInterrupted, end_with_launcher
from ..federation.methods import run_method
from ..output.run_folder import RunFolder
from ..server.server import check_public_dataset
from ..shared.texts import is_conversational, text_columns
from .early import check_sources
from .help import TrainParser
from .plan import plan_tables


RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # in a clone


@dataclass
class FederatedScriptArguments(ScriptArguments):
    """
    Where the texts come from. A dataset is a name on the Hub, a folder, or a file (.jsonl, .json, .csv, .tsv, .txt,
    .parquet, maybe with .gz, .bz2 or .xz behind), on this machine or under an https address.

    `dataset_name` is the private training set, split among clients as `--partition` says, unless `client_datasets`
    gives each client its own. Public text goes through the clients' templates where its columns fit them.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Private training set, split among clients as partition says."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration on the Hub, of client_datasets and eval_dataset_name as well."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of it that clients train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of it that is held out."})
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
    partition_values: list[str] | None = field(
        default=None,
        metadata={"help": "Keep only private examples with one of these values in partition_column. Default: all."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out set, if it is not the test split of dataset_name."}
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share of dataset_name instead, of each value of partition_column if it is split by one."
        },
    )
    public_dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Public set for the alignment, or several. In a YAML, each may have a path, name (configuration), split, "
            "fraction, prompt_template and completion_template of its own."
        },
    )
    public_dataset_config: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    public_dataset_split: str = field(default="train", metadata={"help": "Its split."})
    public_fractions: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of each public set, as many rows as can be without taking one twice. Default: all rows of all."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={"help": "Makes the prompt of private examples, with columns in braces: 'Question: {question}'."},
    )
    completion_template: str | None = field(default=None, metadata={"help": "Makes their completion."})
    public_prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "The same for public examples. Default: the clients' templates for a set that has their columns; one that "
            "has not stays as it is."
        },
    )
    public_completion_template: str | None = field(default=None, metadata={"help": "The same for public examples."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use this many private examples at most, of each client_datasets."}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many held-out examples at most."})
    max_public_samples: int | None = field(default=None, metadata={"help": "Use this many public examples at most."})
    plan_only: bool = field(
        default=False, metadata={"help": "Print what the run would cost, from the model's config, and end."}
    )

    def __post_init__(self):
        check_sources(self)


def _task_folder(task: str) -> Path:
    folder = RECIPES / task
    if not folder.is_dir():
        raise ValueError(
            f"`task` is '{task}', whose data and model are in the repository's folder recipes/, not in the installed package. "
            "Run recipes/fedbiot_sft.py of a clone, or name a model and data of your own."
        )
    return folder


def load_datasets(script_args: FederatedScriptArguments, args: FedBiOTConfig) -> dict:
    """The dataset arguments of [`run_method`]."""
    seed = args.seed
    if script_args.task == "demo":
        task = runpy.run_path(str(_task_folder("demo") / "task.py"))
        client_datasets, eval_dataset = task["private_domains"](
            {"clinic": 300, "shop": 450, "library": 600}, seed=seed
        )
        return {
            "client_datasets": client_datasets,
            "public_dataset": task["public_corpus"](3000, seed=seed),
            "eval_dataset": eval_dataset,
        }

    private = (script_args.prompt_template, script_args.completion_template)
    split, limit = script_args.dataset_train_split, script_args.max_train_samples
    config, eval_name = script_args.dataset_config, script_args.eval_dataset_name
    loaded, heldout = {}, None
    if script_args.client_datasets is not None:
        pairs = [item.partition("=")[::2] for item in script_args.client_datasets]
        if not all(name and dataset for name, dataset in pairs):
            raise ValueError(f"`client_datasets` must be NAME=DATASET each, got {script_args.client_datasets}.")
        loaded["client_datasets"] = [
            (name, to_examples(read_dataset(dataset, config, split), private, limit, seed, dataset))
            for name, dataset in pairs
        ]
    elif script_args.dataset_name is not None:
        name = script_args.dataset_name
        train = read_dataset(name, config, split)
        column = None if args.partition == "iid" else args.partition_column
        if script_args.partition_values is not None:
            if column is None:
                raise ValueError(
                    f"`partition_values` is {script_args.partition_values}, but `partition` is 'iid', which reads no "
                    "column. Use 'by-column' or 'dirichlet', or leave it out."
                )
            train = keep_values(train, column, script_args.partition_values)
        if script_args.eval_fraction is not None:
            train, heldout = hold_out(train, script_args.eval_fraction, column, seed)
        elif eval_name is None and has_splits(name):
            eval_name = name
        loaded["train_dataset"] = to_examples(train, private, limit, seed, name)
    if eval_name is not None:
        heldout = read_dataset(eval_name, config, script_args.dataset_test_split)
    if heldout is not None:
        source = eval_name or script_args.dataset_name or ""
        loaded["eval_dataset"] = to_examples(heldout, private, script_args.max_eval_samples, seed, source)
    sources = public_sources(script_args)
    if sources:
        chat = _is_chat(loaded, args.dataset_text_field)
        loaded["public_dataset"], lines = read_public(
            sources, private, chat, script_args.max_public_samples, seed, args.dataset_text_field
        )
        if args.process_index == 0:
            for line in lines:
                Console().print(line, markup=False, highlight=False, soft_wrap=True)
    return loaded


def _is_chat(loaded: dict, text_field: str) -> bool:
    """Whether the clients' text is conversations."""
    named = {"`dataset_name`": loaded.get("train_dataset")}
    named |= {f"client '{name}'": dataset for name, dataset in loaded.get("client_datasets", [])}
    named |= {"`eval_dataset_name`": loaded.get("eval_dataset")}  # where the clients' own is elsewhere
    name, dataset = next(((name, dataset) for name, dataset in named.items() if dataset is not None), ("", None))
    return dataset is not None and is_conversational(dataset, text_columns(dataset, name, text_field))


def prepare(script_args: FederatedScriptArguments, training_args: FedBiOTConfig, model_args: ModelConfig) -> dict:
    """What the parsed arguments ask for, as arguments of [`FederatedRunner`]."""
    if not training_args.resume_from_checkpoint and not script_args.plan_only:
        RunFolder(training_args, None).check_free()  # before anything is loaded
    model_name = model_args.model_name_or_path
    if script_args.task is not None and model_name is None:
        model_name = str(_task_folder(script_args.task) / "base")
    if model_name is None:
        raise ValueError(
            "`model_name_or_path` is not set. Name the full model: a folder, or as it is called on the Hub."
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
    datasets = load_datasets(script_args, training_args)
    return {"model": model_name, "args": training_args, "peft_config": peft_config, **datasets}


def train(script_args: FederatedScriptArguments, training_args: FedBiOTConfig, model_args: ModelConfig):
    """Run, or plan, what the parsed arguments ask for."""
    prepared = prepare(script_args, training_args, model_args)
    (print_plan if script_args.plan_only else run_method)(script_args.method, **prepared)


def print_plan(
    method: str,
    model: str,
    args: FedBiOTConfig,
    peft_config: LoraConfig,
    client_datasets: list[tuple[str, Dataset]] | None = None,
    train_dataset: Dataset | None = None,
    public_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
):
    """Print what [`run_method`] with these arguments would cost."""
    num_clients = len(name_client_datasets(client_datasets, train_dataset, args))
    args = METHODS[method].configure(args, num_clients)
    if METHODS[method].clients == "alone" or args.num_rounds == 0:
        raise ValueError(
            f"`plan_only` is True, but `method` is '{method}' ({METHODS[method].description}), and a plan is for one run "
            "in which clients train. Plan another, such as 'fedbiot'."
        )
    if args.aligns:
        check_public_dataset(public_dataset, args)
    args.num_clients = num_clients if METHODS[method].clients == "federated" else 1
    costs = plan(model, args, peft_config, public_examples=len(public_dataset) if public_dataset is not None else 1)
    if args.process_index == 0:
        for table in plan_tables(costs):
            Console().print(table, "")


def make_parser(
    script_arguments: type = FederatedScriptArguments, command: str = "train", text: str = ""
) -> TrlParser:
    return TrainParser(script_arguments, command, (text or __doc__ or "").strip())


def main(argv: list[str] | None = None):
    """Run what the command line or `argv` asks for. A run that is stopped exits with 128 + the signal's number."""
    # Deprecations inside the libraries are not for the reader of this command's output.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch.distributed")
    end_with_launcher()
    try:
        train(*make_parser().parse_args_and_config(sys.argv[1:] if argv is None else argv))
    except RunInterrupted as interruption:
        sys.stderr.write(f"{interruption}. To go on: --resume_from_checkpoint true\n")
        sys.exit(128 + interruption.signal)
