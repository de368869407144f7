"""A setting of another kind is refused, and named, before any work."""

import re
from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
from conftest import sums

from fedbiot_trainer.cli.early import check_early
from fedbiot_trainer.cli.train import make_parser
from fedbiot_trainer.config.settings import GROUPS


SETTINGS = {setting.name: get_args(setting.type) or (setting.type,) for group in GROUPS for setting in fields(group)}
WRONG = {
    int: ("many", 2.5, [3], True),
    float: ("5e-4", [0.5], True, float("nan")),
    bool: ("false", 1),
    str: (3, ["a"]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_the_federation(make_args, name):
    for value in WRONG.get(SETTINGS[name][0], ("x", 3, [None])):
        with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value!r}, but it must be ")):
            make_args(**{name: value})


@pytest.mark.parametrize(
    "name, value, right",
    [
        ("learning_rate", "5e-4", "a number"),  # what YAML makes of 5e-4
        ("learning_rate", float("nan"), "a number"),
        ("per_device_train_batch_size", 2.5, "a whole number"),
        ("max_length", "320", "a whole number or None"),
        ("use_cpu", "false", "True or False"),
        ("bf16", "no", "True, False or None"),
    ],
)
def test_numbers_and_switches_of_training(make_args, name, value, right):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value!r}, but it must be {right}.")):
        make_args(**{name: value})


def test_kinds_that_do_as_well(make_args, tmp_path):
    args = make_args(
        **{"fraction_train": 1, "max_grad_norm": float("inf"), "plug_in_scales": (0.5, 1)},
        **{"learning_rate": np.float32(1e-3), "teacher_cache_dir": tmp_path, "warmup_steps": 0.1},
    )
    assert args.plug_in_scales == (0.5, 1) and args.teacher_cache_dir == str(tmp_path)
    assert make_args(plug_in_scales=np.linspace(0.5, 1, 2), packing=None).plug_in_scales == [0.5, 1.0]
    args.to_json_string()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--plug_in_steps many", "`plug_in_steps` is 'many', but it must be a whole number."),
        ("--num_rounds 2.5", "`num_rounds` is '2.5', but it must be a whole number."),
        (
            "--plug_in_scales 0.5 half",
            "`plug_in_scales` is [0.5, 'half'], but it must be None or a list of which each is a number",
        ),
        ("--freeze_a maybe", "`freeze_a` is 'maybe', but it must be True or False."),
        ("--eval_fraction half", "`eval_fraction` is 'half', but it must be a number or None."),
        (
            "--public_fractions x",
            "`public_fractions` is ['x'], but it must be None or a list of which each is a number.",
        ),
    ],
)
def test_flags(flags, message):
    own = ["--model_name_or_path", "org/model", "--client_datasets", "a=org/a", "--public_dataset_name", "org/p"]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_early([*own, *flags.split()])


def test_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: org/model\nclient_datasets: [a=org/a]\nnum_rounds: many\n")
    with pytest.raises(ValueError, match="`num_rounds` is 'many', but it must be a whole number."):
        check_early(["--config", str(file)])
    file.write_text(
        "model_name_or_path: org/model\nclient_datasets: [a=org/a]\nproximal_weight: 1e-4\nnum_rounds: 2.5"
    )
    with pytest.raises(ValueError, match="`num_rounds` is 2.5, but it must be a whole number."):
        check_early(["--config", str(file)])


@pytest.mark.parametrize("line", ["lora_r: 2.5", "max_train_samples: [3]", "logging_steps: [1]"])
def test_yaml_of_other_arguments(tmp_path, line):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: out\nuse_cpu: true\nclient_datasets: [a=org/a]\npublic_dataset_name: org/p\n{line}\n"
    )
    name, _, value = line.partition(": ")
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value}, but it must be a ")):
        make_parser().parse_args_and_config(["--config", str(file)])


def test_a_run_with_numpys_numbers(make_runner):
    settings = {"num_rounds": np.int64(1), "local_steps": np.int32(1), "proximal_weight": np.float64(0.001)}
    runner = make_runner(**settings, eval_dataset=sums(40, 44))
    assert runner.train().best_round == 1
    assert make_runner(**settings | {"num_rounds": 2}, resume_from_checkpoint=True).train().rounds == 2
