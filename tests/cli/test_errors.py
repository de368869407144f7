import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedbiot_trainer.cli import plan, serve
from fedbiot_trainer.cli.early import check_early
from fedbiot_trainer.cli.main import main


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "fedbiot_sft.py"
YAMLS = sorted(path for path in (ROOT / "recipes").glob("**/*.yaml") if path.parent.name != "lm_eval")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
RATIO = (
    "fedbiot train: error: `emulator_drop_ratio` is 1.5, but it is the share of layers to drop and must be in [0, 1). The "
    "paper uses 0.2 and 0.5; 0 keeps the full model."
)
OWN = ["--model_name_or_path", "org/model", "--client_datasets", "a=org/a", "--public_dataset_name", "org/p"]


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, cwd=ROOT
    )


def test_wrong_setting_is_found_before_any_library_is_imported():
    code = (
        "import sys\nfrom fedbiot_trainer.cli.main import main\n"
        "try:\n    main(['train', '--task', 'demo', '--emulator_drop_ratio', '1.5'])\n"
        "except SystemExit as end:\n    assert end.code == 1\n"
        "assert not {'torch', 'datasets', 'transformers', 'trl', 'peft'} & set(sys.modules)\n"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == RATIO + "\n"


def test_settings_of_several_words(tmp_path):
    flags = "--aggregation svd --client_ranks north=2 south=4 --plug_in_scales 0.5 1"
    check_early([*OWN, *flags.split()])
    with pytest.raises(ValueError, match=r"`client_ranks` must be NAME=RANK .* got \['north=2', 'south'\]"):
        check_early([*OWN, *flags.replace("south=4", "south").split()])
    with pytest.raises(ValueError, match=r"`plug_in_scales` is \[0.5, -1.0\]"):
        check_early([*OWN, *flags.replace(" 1", " -1").split()])
    file = tmp_path / "run.yaml"
    file.write_text("plug_in_scales: [0.5, -2]")
    with pytest.raises(ValueError, match=r"`plug_in_scales` is \[0.5, -2\]"):
        check_early([*OWN, "--config", str(file)])


@pytest.mark.parametrize("processes", [1, 2])
def test_last_line_under_accelerate_launch(processes):
    launcher = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    if processes == 2:
        launcher += ["--config_file", ROOT / "accelerate_configs" / "cpu" / "ddp.yaml"]
    else:
        launcher += ["--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    result = run(*launcher, RECIPE, "--emulator_drop_ratio", "1.5")
    assert result.returncode == 1
    assert "Error: " in result.stderr.partition(RATIO)[2]  # the launcher's own trace
    assert result.stderr.splitlines()[-1] == RATIO


@pytest.mark.trains
def test_error_of_a_library_comes_with_its_traceback(tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit) as end:
        main([
            "train", "--model_name_or_path", "org/model", "--client_datasets", f"a={data}", "--output_dir",
            f"{tmp_path}/out", "--use_cpu", "true", "--initial_alignment_steps", "0", "--alignment_steps", "0",
        ])  # fmt: skip
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback (most recent call last):" in said
    assert "fedbiot train: error: " in said.rpartition("Traceback")[2]


@pytest.mark.parametrize(
    "flags, error, message",
    [
        (["--fraction_train", "0"], ValueError, "`fraction_train` is 0.0"),
        (["--partition", "by-column"], ValueError, "`partition_column` is not set"),
        (["--num_adapter_layers=0"], ValueError, "`num_adapter_layers` is 0"),
        (["--public-dataset-name", "./gone.jsonl"], FileNotFoundError, "There is no file './gone.jsonl'"),
        (["--client_datasets", "a=org/a", "b=gone.JSONL.gz"], FileNotFoundError, "There is no file 'gone.JSONL.gz'"),
        (
            ["--model_name_or_path", "./gone"],
            FileNotFoundError,
            "`model_name_or_path` is './gone', but there is no such folder",
        ),
        (["--prompt_template", "{x}"], ValueError, "`prompt_template` and `completion_template` belong together"),
        (["--prompt_template", "{x", "--completion_template", "y"], ValueError, "which is no template"),
        (["--dataset_name", "org/b"], ValueError, "Set one of `dataset_name` and `client_datasets`"),
        (["--eval_fraction", "0.1"], ValueError, "`eval_fraction` is 0.1, but it is about `dataset_name`"),
        (["--config", "gone.yaml"], FileNotFoundError, "`config` is 'gone.yaml', but there is no such file"),
        (
            ["--model_name_or_path", "outputs/to/b"],
            FileNotFoundError,
            "`model_name_or_path` is 'outputs/to/b', but there is no",
        ),
    ],
)
def test_flags_that_cannot_work(flags, error, message):
    with pytest.raises(error, match=message):
        check_early([*OWN, *flags])


def test_yaml_is_read_under_the_flags(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("task: demo\nemulator_drop_ratio: 2\n")
    with pytest.raises(ValueError, match="`emulator_drop_ratio` is 2"):
        check_early(["--config", str(file)])
    check_early(["--config", str(file), "--emulator_drop_ratio", "0.5"])
    check_early(["--config", str(file), "--help"])
    file.write_text("task: [demo\n")
    with pytest.raises(ValueError, match="`config` is '.*run.yaml', which is no YAML"):
        check_early(["--config", str(file)])
    file.write_text("task demo\n")
    with pytest.raises(ValueError, match="`config` is '.*run.yaml', which has no settings"):
        check_early(["--config", str(file)])
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="`config` is '.*run.yaml', which is no YAML"):
        check_early(["--config", str(file)])


@pytest.mark.parametrize(
    "module, flags", [(serve, ["--config", "gone.yaml"]), (plan, ["--model", "./gone"])], ids=["serve", "plan"]
)
def test_other_commands_name_what_is_not_there(module, flags, monkeypatch):
    monkeypatch.setattr(serve, "check_installed", lambda *names: None)
    with pytest.raises((FileNotFoundError, SystemExit), match=f"is '{flags[1]}', but there is no such"):
        module.main(flags)


@pytest.mark.parametrize("path", YAMLS, ids=[f"{path.parent.name}/{path.stem}" for path in YAMLS])
def test_recipes_pass(path):
    try:
        check_early(["--config", str(path)])
    except FileNotFoundError as error:  # what a step of the recipe writes first
        assert "outputs/" in str(error)
