import contextlib
import copy
import json
import os
import tempfile
from functools import partial
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Where the hidden states of public text are kept by default.
# Its own folder for each worker of pytest-xdist, so that none reads what another is writing.
os.environ["HF_HOME"] = os.path.join(
    tempfile.gettempdir(), "fedbiot-trainer-tests", os.environ.get("PYTEST_XDIST_WORKER", "main")
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import evaluate
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import fedbiot_trainer
from fedbiot_trainer import EmulatorAlignmentTrainer, FedBiOTConfig, FederatedRunner
from fedbiot_trainer.server.split_model import SplitModel
from fedbiot_trainer.shared import compat
from fedbiot_trainer.shared.lora_state import get_lora_state, save_lora, set_lora_state


torch.set_num_threads(1)

VOCABULARY = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 .:+=?"]
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def pytest_collection_modifyitems(items):
    for item in items:
        if {"make_args", "shared_run"} & set(item.fixturenames):  # a trainer's settings
            item.add_marker("trains")


def tiny_model(model_type="llama", seed=0, dtype=torch.float32, **changes):
    """A random causal LM of 8 layers. Weights are large enough that dropping a layer changes the output."""
    config = AutoConfig.for_model(model_type, **{**SIZES, "initializer_range": 0.2, **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


ARCHITECTURES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 4},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6},
    "phi3": {},
    "olmo2": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "falcon": {},
    "bloom": {},
}


# A parameter that `make test` leaves out, as others show the same.
slow = partial(pytest.param, marks=pytest.mark.slow)
# Older versions of transformers have the second name for it.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(FedBiOTConfig, name)
)
needs_experts = pytest.mark.skipif(compat.EXPERTS.applies, reason=f"this version of PEFT {compat.EXPERTS.why}")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def random_lora(like, size=0.1, seed=0):
    """A LoRA's state of normal random numbers, A and B, in the shapes and dtypes of the state `like`."""
    generator = torch.Generator().manual_seed(seed)
    return {key: (size * torch.randn(t.shape, generator=generator)).to(t.dtype) for key, t in like.items()}


def randomize(model, *lora_names, size=0.1):
    """Give LoRAs of a model random values, so that they change its output. Returns their states."""
    states = []
    for seed, name in enumerate(lora_names):
        states.append(random_lora(get_lora_state(model, name), size, seed))
        set_lora_state(model, name, states[-1])
    return states


def trained(model, num_adapter_layers=2):
    """A split of `model` with random LoRAs, and its package."""
    models = SplitModel(model, num_adapter_layers, 0.5, LoraConfig(r=4, target_modules="all-linear"))
    states = randomize(models.adap_emu, "client", "emulator")
    models.plug_in(states[0])
    return models, models.package(*states)


def save_result(models, package, folder, base_model):
    """What a run leaves of the client LoRA."""
    save_lora(folder, models.adap_fu.peft_config["client"], models.split.to_full(package.client_lora), base_model)
    return folder


# What a training in float64 may end apart that is computed in two ways, where its numbers are about 0.1. They differ by
# rounding, 1e-16, which would have to grow 1e8-fold in the training to come to this (less than 100-fold is what was seen),
# and what one of the two leaves out is far above.
HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


def assert_as_exact(ours, theirs, exact):
    """
    Two float32 tensors of one formula are sums of the same products in different orders, so what they may differ by is
    their rounding. It is measured, as it depends on the values and on the CPU: `ours` may be 4 times as far from the
    float64 tensor `exact` as `theirs` is, both as norms. A norm sums many roundings, so two that are equally good are
    within a factor of 2 of one another (over seeds, with AVX2 and with AVX-512), and one that leaves anything out is
    thousands of times further. That holds where no single rounding is blown up: for LoRAs as small as `random_lora`'s.
    """
    error, rounding = ((tensor.double() - exact).norm().item() for tensor in (ours, theirs))
    assert exact.dtype == torch.float64
    assert error <= 4 * rounding, f"{error:.1e} from the float64 values, which are {rounding:.1e} from the others"


@torch.no_grad()
def assert_same_model(ours, theirs, batch):
    """Two models are one function: as [`assert_as_exact`], with `theirs` in float64 as what is exact."""
    exact = copy.deepcopy(theirs).eval().double()
    for module in exact.modules():
        if getattr(module, "config", None) is not None:
            module.config._experts_implementation = "eager"  # the grouped products of experts have no float64
    assert_as_exact(ours.eval()(**batch).logits, theirs.eval()(**batch).logits, exact(**batch).logits)


def base_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def changed(before, model):
    """The names of the tensors that are no longer what they were."""
    return [name for name, p in model.named_parameters() if name in before and not torch.equal(before[name], p)]


def assert_same(one, other):
    """Two states of a LoRA or a model are the same bits under the same names."""
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def rounds_of(runner):
    """What a run left in `rounds.jsonl`."""
    return [json.loads(line) for line in runner.folder.rounds.read_text().splitlines()]


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def sums(start, stop):
    """Prompt-completion examples `a+b=` of numbers in a range."""
    rows = [(a, b) for a in range(start, stop) for b in range(3)]
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in rows], "completion": [f"{a + b}" for a, b in rows]})


def save_files(folder, tokenizer, **datasets):
    """What command lines name: a model with its tokenizer in `base`, and a file for each dataset. Gives the folder."""
    tiny_model().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, dataset in datasets.items():
        dataset.to_json(folder / f"{name}.jsonl")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(params=ARCHITECTURES)
def any_model(request):
    return tiny_model(request.param.removesuffix("-tied"), **ARCHITECTURES[request.param])


@pytest.fixture
def model():
    return tiny_model()


def leave_out_figures(monkeypatch):
    """Drawing takes a quarter of a run of a tiny model."""
    monkeypatch.setattr("fedbiot_trainer.output.run_folder.plot_rounds", lambda *args: None)


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """Only tests that are marked `figures` have them."""
    if "figures" not in request.keywords:
        leave_out_figures(monkeypatch)


def tiny_args(folder, **changes):
    """The settings of a run of seconds, in `folder / "run"`."""
    settings = {
        "output_dir": str(folder / "run"),
        "num_rounds": 2,
        "local_steps": 3,
        "initial_alignment_steps": 3,
        "alignment_steps": 2,
        "alignment_init": "zero",
        "alignment_batch_size": 4,
        "teacher_cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "alignment_learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        **changes,
    }
    return FedBiOTConfig(**settings)


@pytest.fixture(scope="session", autouse=True)
def without_full_collections():
    """
    Accelerate collects garbage at the start of every `train()`. Going through all that the libraries hold takes longer
    than the few steps of a tiny model, so it is left to Python, and runs have nothing to keep out of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.clear_device_cache", lambda garbage_collection=False: None)
        patch.setattr("fedbiot_trainer.federation.runner.frozen_garbage", contextlib.nullcontext)
        yield


@pytest.fixture
def make_args(tmp_path):
    return partial(tiny_args, tmp_path)


@pytest.fixture
def make_alignment(make_args, tokenizer, model):
    def make(dataset=None, model=model, **changes):
        dataset = sums(40, 60) if dataset is None else dataset
        return EmulatorAlignmentTrainer(
            model, make_args(**changes), dataset, peft_config=LORA, processing_class=tokenizer
        )

    return make


@pytest.fixture
def package(make_alignment, tmp_path):
    trainer = make_alignment()
    trainer.train()
    trainer.save_model(tmp_path / "package")
    return str(tmp_path / "package")


# Alignment that sees all of `make_runner`'s public text before the first round. Runs of different lengths then compute
# their hidden states in the same batches, and so to the same bits on every CPU.
ALL_PUBLIC_TEXT = {"initial_alignment_steps": 8}


def tiny_runner(make_args, tokenizer, model=None, client_datasets=None, peft_config=None, callbacks=None, **changes):
    """A runner of a tiny model and two clients. `changes` are of datasets or settings."""
    data = {"public_dataset": sums(40, 50), "eval_dataset": sums(50, 55)}
    for name in (*data, "train_dataset", "emulator_peft_config"):
        if name in changes:
            data[name] = changes.pop(name)
    if "train_dataset" not in data and client_datasets is None:
        client_datasets = {"north": sums(0, 8), "south": sums(8, 12)}
    return FederatedRunner(
        model=tiny_model() if model is None else model,
        args=make_args(**changes),
        client_datasets=client_datasets,
        processing_class=tokenizer,
        peft_config=peft_config or LORA,
        callbacks=callbacks,
        **data,
    )


@pytest.fixture
def make_runner(make_args, tokenizer):
    return partial(tiny_runner, make_args, tokenizer)


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory, tokenizer):
    """
    Makes a runner as `make_runner` does and trains it, for a fixture of a module whose tests only look at the run. What
    `prepare` does to the runner comes before.
    """

    def train(prepare=lambda runner: None, **changes):
        runner = tiny_runner(partial(tiny_args, tmp_path_factory.mktemp("shared")), tokenizer, **changes)
        prepare(runner)
        with pytest.MonkeyPatch.context() as monkeypatch:
            leave_out_figures(monkeypatch)
            runner.train()
        return runner

    return train


@pytest.fixture
def batch():
    torch.manual_seed(1)
    input_ids = torch.randint(3, 48, (3, 10))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 7:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def pass_at_k(monkeypatch):
    """The metric that runs code, allowed to."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    folder = Path(fedbiot_trainer.__file__).parent / "evaluation" / "metrics" / "pass_at_k"
    metric = evaluate.load(str(folder), keep_in_memory=True)
    try:
        metric.compute(predictions=["x = 1"], references=["assert x"])
    except RuntimeError as error:
        pytest.skip(f"this machine cannot run a sandbox: {error}")
    return metric
