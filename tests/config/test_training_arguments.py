import dataclasses
import logging
import runpy
from pathlib import Path

import pytest
import torch
from conftest import slow, sums, tiny_model
from trl import SFTConfig

from fedbiot_trainer import FedBiOTConfig
from fedbiot_trainer.config.settings import GROUPS
from fedbiot_trainer.config.training_arguments import TREATMENTS, NoEffect, Refused, Used


OURS = {field.name for group in GROUPS for field in dataclasses.fields(group)}
DOCS = Path(__file__).parents[2] / "docs"


def another(field):
    """A value that a field does not have by default."""
    values = {
        "train_sampling_strategy": "sequential",
        "parallelism_config": {"tp_size": 2},
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "debug": "underflow_overflow",
        "logging_strategy": "no",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "hub_strategy": "checkpoint",
        "include_num_input_tokens_seen": "all",
        "include_for_metrics": ["loss"],
        "eval_packing": True,
    }
    if field.name in values:
        return values[field.name]
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool):
        return not default
    return {"length_column_name": "size", "label_names": ["labels"], "optim_target_modules": ["q_proj"]}.get(
        field.name, 7
    )


FIELDS = {field.name: field for field in dataclasses.fields(SFTConfig)}
REFUSED = [name for name, treatment in TREATMENTS.items() if isinstance(treatment, Refused)]
WITHOUT = [name for name, treatment in TREATMENTS.items() if isinstance(treatment, NoEffect)]


# What old versions of transformers have, deprecated, and what they have not yet.
GONE = {"logging_dir", "warmup_ratio"} & FIELDS.keys()
MISSING = {
    "activation_checkpointing", "activation_checkpointing_kwargs", "dataloader_in_order",
    "dataloader_multiprocessing_context",
} - FIELDS.keys()  # fmt: skip


def test_every_field_of_trl_is_treated():
    assert set(TREATMENTS) - MISSING == FIELDS.keys() - OURS - GONE
    assert all(isinstance(treatment, Used | Refused | NoEffect) for treatment in TREATMENTS.values())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_set_is_refused(make_args, name):
    with pytest.raises(ValueError, match=f"`{name}` is .*, but "):
        make_args(**{name: another(FIELDS[name])})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"optim": "schedule_free_adamw"}, "`optim` is 'schedule_free_adamw', which needs whole matrices"),
        ({"optim": "galore_adamw"}, "`optim` is 'galore_adamw'"),
        ({"accelerator_config": {"split_batches": True}}, "`accelerator_config` has `split_batches` True"),
        ({"accelerator_config": {"even_batches": False}}, "`accelerator_config` has `even_batches` False"),
    ],
    ids=lambda value: str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_values_that_rounds_have_no_place_for(make_args, settings, message):
    with pytest.raises(ValueError, match=message):
        make_args(**settings)


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return lambda: [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_effect_is_named(make_args, name):
    value = another(FIELDS[name])
    said = make_args(**{name: value}).without_effect()
    if value in TREATMENTS[name].anyway:
        assert said == {}
    else:
        assert list(said) == [name] and said[name].startswith(f"`{name}` is {value!r}, which has no effect: ")


def test_one_warning_names_all_that_has_no_effect(make_runner, warnings):
    make_runner(num_train_epochs=7, save_steps=20, do_train=True)
    [message] = [message for message in warnings() if "no effect" in message]
    assert message.splitlines() == [
        "`num_train_epochs` is 7, which has no effect: a run counts `num_rounds` rounds of `local_steps` steps.",
        "`save_steps` is 20, which has no effect: the LoRAs are saved after each round, no checkpoint is.",
    ]


def test_what_the_configuration_resolves_itself_is_not_the_users(tmp_path):
    args = FedBiOTConfig(str(tmp_path), use_cpu=True)
    assert args.disable_tqdm is not None and args.accelerator_config is not None  # None before
    assert args.without_effect() == {}
    assert dataclasses.replace(args, seed=1).without_effect() == {}


def test_a_field_of_a_later_version_is_no_error(make_args, monkeypatch):
    monkeypatch.delitem(TREATMENTS, "weight_decay")
    [said] = make_args(weight_decay=0.1).without_effect().values()
    assert said.startswith("`weight_decay` is 0.1, which this version of fedbiot-trainer does not know")


@pytest.mark.skipif(bool(GONE | MISSING), reason="the page is of newer versions")
def test_page_of_the_settings_is_up_to_date():
    script = runpy.run_path(str(DOCS / "settings.py"))
    assert script["settings_page"]() == script["PAGE"].read_text(), "run `python docs/settings.py`"


# One client and little public text: no more is needed to see a difference.
ONE_ROUND = {
    "num_rounds": 1, "local_steps": 3, "initial_alignment_steps": 2, "alignment_steps": 1, "eval_dataset": None,
    "gradient_accumulation_steps": 1, "client_datasets": {"north": sums(0, 8)}, "client_zero_shot_examples": 0,
}  # fmt: skip


def trained_loras(make_runner, tmp_path, name, **settings):
    runner = make_runner(**{**ONE_ROUND, "output_dir": str(tmp_path / name), **settings})
    runner.train()
    server = runner.server
    return server.client_lora | {f"emulator {key}": value for key, value in server.emulator_lora.items()}


def differ(one, other):
    return {key.startswith("emulator ") for key in one if not torch.equal(one[key], other[key])}


@pytest.fixture(scope="module")
def reference():
    """The LoRAs of the run without any of the settings, by local steps and batch size: several tests ask for the same."""
    return {}


@pytest.fixture
def plain_loras(make_runner, tmp_path, reference):
    def loras(local_steps=3, batch_size=4):
        if (local_steps, batch_size) not in reference:
            sizes = {"local_steps": local_steps, "per_device_train_batch_size": batch_size}
            reference[local_steps, batch_size] = trained_loras(make_runner, tmp_path, "plain", **sizes)
        return reference[local_steps, batch_size]

    return loras


# Where the effect is: False the client LoRA, True the emulator LoRA.
CLIENT, BOTH = {False}, {False, True}
EFFECTS = [
    ({"learning_rate": 5e-3}, CLIENT),
    slow({"lr_scheduler_type": "linear"}, CLIENT),
    ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}, CLIENT),
    slow({"warmup_steps": 2}, CLIENT),
    ({"per_device_train_batch_size": 2}, CLIENT),
    ({"gradient_accumulation_steps": 2}, CLIENT),
    slow({"optim": "sgd"}, BOTH),
    ({"optim": "adafactor", "optim_args": "clip_threshold=0.1"}, BOTH),
    ({"weight_decay": 0.5}, BOTH),
    slow({"adam_beta1": 0.5}, BOTH),
    ({"adam_beta2": 0.5}, BOTH),
    slow({"adam_epsilon": 0.1}, BOTH),
    ({"max_grad_norm": 1e-6}, BOTH),
    slow({"label_smoothing_factor": 0.3}, CLIENT),
    slow({"loss_type": "dft"}, CLIENT),
    ({"completion_only_loss": False}, CLIENT),
    ({"packing": True, "max_length": 32}, CLIENT),  # no text is that long
    slow({"max_length": 4, "completion_only_loss": False}, BOTH),
    ({"bf16": True}, BOTH),
    ({"data_seed": 7}, BOTH),
    slow({"dataloader_drop_last": True, "per_device_train_batch_size": 7}, CLIENT),
    slow({"shuffle_dataset": True}, BOTH),
    ({"eos_token": "="}, BOTH),
]


@pytest.mark.parametrize(
    "settings, where", EFFECTS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_what_is_used_changes_what_is_trained(make_runner, tmp_path, plain_loras, settings, where):
    base = plain_loras()
    if "per_device_train_batch_size" in settings and len(settings) > 1:
        base = plain_loras(local_steps=5, batch_size=7)
        settings = settings | {"local_steps": 5}
    loras = trained_loras(make_runner, tmp_path, "changed", **settings)
    assert where <= differ(loras, base)
    assert all(isinstance(TREATMENTS[name], Used) for name in settings.keys() - OURS)
    if where == CLIENT and "completion_only_loss" not in settings:
        # the alignment of round 1 comes before any client trains
        assert differ(loras, base) == where


def test_what_has_no_effect_changes_nothing(make_runner, tmp_path, plain_loras):
    settings = {name: another(FIELDS[name]) for name in WITHOUT}
    del settings["fp16_full_eval"]  # which Transformers refuses next to `bf16_full_eval`
    assert differ(trained_loras(make_runner, tmp_path, "changed", **settings), plain_loras()) == set()


def test_arguments_of_the_loader_reach_it(make_runner):
    settings = {
        "dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False,
    }  # fmt: skip
    trainer = make_runner(**settings).trainer
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.in_order) == (1, 3, False)
    assert loader.multiprocessing_context.get_start_method() == "fork"


def test_router_loss_counts(make_runner, tmp_path):
    def loras(name, coefficient):
        sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
        model = tiny_model("mixtral", **sizes)
        settings = {"router_aux_loss_coef": coefficient, "learning_rate": 0.1}
        return trained_loras(make_runner, tmp_path, name, model=model, **settings)

    assert False in differ(loras("without", 0.0), loras("with", 10.0))


def test_size_of_evaluation_batches(make_runner, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fedbiot_trainer.evaluation.evaluator.evaluate_loss",
        lambda *args: seen.append(args[3]) or {"loss": 1.0, "token_accuracy": 0.0},
    )
    make_runner(per_device_eval_batch_size=3).evaluate()
    assert set(seen) == {3}


def test_no_bars_are_lines(make_runner):
    assert not make_runner(disable_tqdm=True).console.is_terminal


def test_full_determinism(make_runner, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", lambda seed: asked.append(seed))
    make_runner(full_determinism=True, seed=3)
    assert set(asked) == {3}


@pytest.mark.parametrize("bf16", ["bf16", "dtype"])
def test_slow_bfloat16_is_said_once(make_runner, warnings, monkeypatch, bf16):
    for capabilities, expected in (({"avx2": True, "avx512_bf16": False}, 1), ({"amx_bf16": True}, 1)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda capabilities=capabilities: capabilities)
        settings = {"bf16": True} if bf16 == "bf16" else {"model": tiny_model(dtype=torch.bfloat16)}
        make_runner(**settings)
        slow = [message for message in warnings() if "no instructions for bfloat16" in message]
        assert len(slow) == expected and "about ten times slower than in float32" in slow[0]


def test_float32_is_not_slow(make_runner, warnings, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {})
    make_runner()
    assert not any("bfloat16" in message for message in warnings())


def test_tokenized_text_needs_no_setting(make_runner):
    """What `dataset_kwargs` is refused for works without it."""
    tokens = {"input_ids": [[3, 4, 5, 1]] * 8, "labels": [[-100, 4, 5, 1]] * 8}
    dataset = type(sums(0, 1)).from_dict(tokens)
    runner = make_runner(**{**ONE_ROUND, "local_steps": 1, "client_datasets": {"a": dataset}})
    runner.train()
    assert runner.clients["a"].num_examples == 8
