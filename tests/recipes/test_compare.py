import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import LORA, save_files, slow, sums
from peft import LoraConfig

from fedbiot_trainer import run_method


ROOT = Path(__file__).parents[2]

# Stands in for `python fedbiot_sft.py`: writes what a run leaves, or fails where the method is fedot and the file says so.
RUN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--output_dir"])
with (folder.parent / "calls.txt").open("a") as file:
    file.write(folder.name + "\\n")
if "fedot" in folder.name and (folder.parent / "broken").exists():
    sys.exit("it broke")
template = json.loads((folder.parent / "template.json").read_text())
(folder / "summary.json").write_text(json.dumps(template))
"""


@pytest.fixture(scope="module")
def compare():
    return runpy.run_path(str(ROOT / "recipes" / "compare.py"))


@pytest.fixture
def run_compare(compare, tmp_path):
    def run(*flags):
        launcher = f"{sys.executable} {tmp_path / 'launcher.py'}"
        arguments = ["--task", "demo", "--output_dir", str(tmp_path / "out"), "--launcher", launcher, *flags]
        compare["main"](arguments)
        calls = (tmp_path / "out" / "calls.txt").read_text().splitlines()
        (tmp_path / "out" / "calls.txt").unlink()
        return calls, json.loads((tmp_path / "out" / "results.json").read_text())

    (tmp_path / "launcher.py").write_text(RUN)
    (tmp_path / "out").mkdir()
    scores = {"loss": 2.0, "token_accuracy": 0.5}
    summary = {
        "zero_shot": scores,
        "adap_emu": scores,
        "adap_fu": scores,
        "rounds": 0,
        "bytes": {"once_per_client": 0, "down": 0, "up": 0},
        "parameters": {"full": 100, "adap_emu": 50, "adapter_layers": 20, "trainable_client": 10, "trainable_server": 9,
                       "client_share": 0.5},
        "seconds": {"total": 3.0},
        "split": {"num_layers": 8, "kept": [0], "dropped": [1], "adapter_layers": [7]},
        **{name: {} for name in ("processes", "num_examples", "tokens_per_example", "initial_alignment", "settings",
                                 "peft_config", "versions")},
        "num_public_examples": 0,
    }  # fmt: skip
    (tmp_path / "out" / "template.json").write_text(json.dumps(summary))
    # `--config` and the recipe's path come first on a cell's command line.
    (tmp_path / "launcher.py").write_text("import sys\nsys.argv.pop(1)\n" + RUN)
    return run


SMALL = ("--methods", "fedot", "fedbiot", "full_lora", "--betas", "0.2", "0.5", "--seeds", "0", "1")


def test_cells_and_resume(run_compare, tmp_path):
    calls, results = run_compare(*SMALL, "--ablation", "--jobs", "2")
    names = {f"{method}-beta{beta}" for method in ("fedot", "fedbiot") for beta in (0.2, 0.5)} | {"full_lora"}
    names |= {
        f"{name}-beta0.5"
        for name in (
            "fedbiot_both_ends",
            "fedbiot_no_proximal",
            "fedbiot_align_once",
            "fedbiot_no_kl",
            "fedbiot_closed_form",
        )
    }
    assert sorted(calls) == sorted(f"{name}-seed{seed}" for name in names for seed in (0, 1))
    keys = {"task", "method", "beta", "seed", "adap_emu", "adap_fu", "client_flops", "bytes_per_client_round"}
    assert len(results) == len(calls) and all(keys <= result.keys() for result in results)
    assert {result["beta"] for result in results if result["method"] == "full_lora"} == {None}
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [(row["method"], row["beta"], row["seed"]) for row in rows] == [
        (result["method"], result["beta"], result["seed"]) for result in results
    ]
    for name in ("table.md", "comparison.png", "ablation.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100

    calls, results = run_compare(*SMALL, "--seeds", "0", "1", "2", "--methods", "fedot")
    assert calls == ["fedot-beta0.2-seed2", "fedot-beta0.5-seed2"]
    assert len(results) == 6


def test_an_interrupted_cell_goes_on(compare, tmp_path):
    args, flags = compare["parse_args"](["--task", "demo", "--output_dir", str(tmp_path), "--local_steps", "3"])
    cell = compare["Cell"]("fedbiot", 0.5, 0)
    assert "--overwrite_output_dir" in compare["command"](cell, args, flags)
    state = tmp_path / str(cell) / "state" / "round-000001-0000.safetensors"
    state.parent.mkdir(parents=True)
    state.touch()
    command = compare["command"](cell, args, flags)
    assert "--resume_from_checkpoint" in command and "--overwrite_output_dir" not in command


@pytest.fixture
def start_comparison(tokenizer, tmp_path):
    """Starts a real comparison of small runs. What is left of it at the end is killed."""
    save_files(tmp_path, tokenizer, a=sums(0, 8), b=sums(8, 12), public=sums(20, 30), test=sums(30, 33))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b", "public", "test")}
    recipe = {
        "model_name_or_path": str(tmp_path / "base"), "client_datasets": [f"{name}={files[name]}" for name in "ab"],
        "public_dataset_name": files["public"], "eval_dataset_name": files["test"], "num_rounds": 20, "local_steps": 2,
        "initial_alignment_steps": 2, "alignment_steps": 1, "report_to": "none", "use_cpu": True,
        "teacher_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    started = []

    def start(folder):
        command = [sys.executable, ROOT / "recipes" / "compare.py", "--config", tmp_path / "recipe.yaml"]
        command += ["--output_dir", folder, "--methods", "fedbiot", "local_only", "--betas", "0.5", "--seeds", "0"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        kill_with_its_cell(process)


def cells_of(comparison):
    """The processes of its cells, each in a session of its own."""
    threads = Path(f"/proc/{comparison.pid}/task").glob("*/children")
    return [int(pid) for thread in threads for pid in thread.read_text().split()]


def kill_with_its_cell(comparison):
    """At once, as when the machine goes down."""
    if comparison.poll() is None:
        cells = cells_of(comparison)
        comparison.kill()
        for cell in cells:
            os.killpg(cell, signal.SIGKILL)
        comparison.wait()


@pytest.mark.slow
def test_a_comparison_that_is_killed_within_its_cells_ends_as_one_that_was_not(start_comparison, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start_comparison(whole).wait(900) == 0
    cells = "fedbiot-beta0.5-seed0", "local_only-beta0.5-seed0"
    for cell in cells:
        comparison, deadline = start_comparison(cut), time.monotonic() + 900
        while not any((cut / cell).glob("**/state/*.safetensors")):
            assert comparison.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        kill_with_its_cell(comparison)
        assert not (cut / cell / "summary.json").exists() and not (cut / "results.json").exists()
    assert start_comparison(cut).wait(900) == 0
    for cell in cells:
        assert "going on after round " in (cut / cell / "log.txt").read_text()
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, cut))
    assert [result.pop("seconds") > 0 for result in (*one, *other)] == [True] * 4
    assert one == other


@pytest.mark.slow
def test_a_comparison_that_is_killed_alone_leaves_no_cell(start_comparison, tmp_path):
    comparison, deadline = start_comparison(tmp_path / "out"), time.monotonic() + 900
    folder = tmp_path / "out" / "fedbiot-beta0.5-seed0"
    while not any(folder.glob("state/*.safetensors")):
        assert comparison.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    [cell] = cells_of(comparison)
    comparison.kill()
    comparison.wait()
    while Path(f"/proc/{cell}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "To go on: --resume_from_checkpoint true" in (folder / "log.txt").read_text()


def test_a_cell_that_fails_stops_no_other(run_compare, tmp_path):
    (tmp_path / "out" / "broken").touch()
    with pytest.raises(SystemExit, match="fedot-beta0.2-seed0 failed .*log.txt.*\n.*it broke"):
        run_compare(*SMALL)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 6
    (tmp_path / "out" / "broken").unlink()
    (tmp_path / "out" / "calls.txt").unlink()
    calls, results = run_compare(*SMALL)
    assert len(calls) == 4 and all(call.startswith("fedot") for call in calls)
    assert len(results) == 10


def test_what_is_done_is_reported_without_a_run(run_compare, tmp_path):
    run_compare(*SMALL, "--seeds", "0")
    (tmp_path / "out" / "results.json").unlink()
    (tmp_path / "out" / "calls.txt").touch()
    calls, results = run_compare(*SMALL, "--seeds", "0", "1", "--report_only")
    assert calls == [] and len(results) > 0 and {result["seed"] for result in results} == {0}


def test_other_settings_are_not_mixed_in(run_compare):
    run_compare("--methods", "fedbiot", "--num_rounds", "3")
    with pytest.raises(SystemExit, match=r"`output_dir` is .*made with other settings .*'--num_rounds', '3'"):
        run_compare("--methods", "fedbiot", "--num_rounds", "4")


def test_an_edited_yaml_is_not_mixed_in(compare, tmp_path):
    args, _ = compare["parse_args"](["--task", "demo", "--output_dir", str(tmp_path)])
    args.config, cell = tmp_path / "own.yaml", compare["Cell"]("fedbiot", 0.5, 0)
    args.config.write_text("num_rounds: 3\n")
    (tmp_path / str(cell)).mkdir()
    (tmp_path / str(cell) / "cell.json").write_text(json.dumps(compare["made_with"](cell, args, [])))
    args.config.write_text("num_rounds: 3  # a comment changes nothing\n")
    assert compare["is_done"](cell, args, [])
    args.config.write_text("num_rounds: 4\n")
    with pytest.raises(ValueError, match="made with other settings .`num_rounds` in the YAML was 3"):
        compare["is_done"](cell, args, [])


def test_another_launch_or_other_data_is_not_mixed_in(compare, tmp_path):
    args, _ = compare["parse_args"](["--task", "demo", "--output_dir", str(tmp_path)])
    cell, data, flags = (
        compare["Cell"]("fedbiot", 0.5, 0),
        tmp_path / "a.jsonl",
        ["--client_datasets", f"a={tmp_path}/a.jsonl"],
    )
    data.write_text("{}")
    (tmp_path / str(cell)).mkdir()
    (tmp_path / str(cell) / "cell.json").write_text(json.dumps(compare["made_with"](cell, args, flags)))
    assert compare["is_done"](cell, args, flags)
    for name, value in (("launcher", "accelerate launch --num_processes 2"), ("drift", not args.drift)):
        other = argparse.Namespace(**{**vars(args), name: value})
        with pytest.raises(ValueError, match=f"made with other settings .{name} was"):
            compare["is_done"](cell, other, flags)
    data.write_text('{"a": 1}')
    os.utime(data, (1, 1))
    with pytest.raises(ValueError, match="made with other settings .files was"):
        compare["is_done"](cell, args, flags)


def test_what_cannot_work(run_compare, capsys):
    for flags, message in (
        (["--jobs", "0"], "`--jobs` is 0"),
        (["--betas", "0.5", "1.0"], r"`--betas` is [0.5, 1.0]"),
        (["--methods", "fedavg"], "invalid choice: 'fedavg'"),
        (["--emulator_drop_ratio", "0.2"], "`--emulator_drop_ratio` is set by the comparison in each cell. Choose"),
        (["--plan_only", "true"], "`--plan_only` is set by the comparison in each cell. Each has to run"),
        (["--seed=3"], "`--seed` is set by the comparison in each cell. Choose with `--seeds`"),
    ):
        with pytest.raises(SystemExit):
            run_compare(*flags)
        assert message in capsys.readouterr().err


def test_runs_without_held_out_text(run_compare, tmp_path):
    template = tmp_path / "out" / "template.json"
    summary = json.loads(template.read_text())
    template.write_text(json.dumps(summary | dict.fromkeys(("zero_shot", "adap_emu", "adap_fu"))))
    with pytest.raises(SystemExit, match="fedbiot-beta0.5-seed0 has evaluated nothing: give the runs held-out text"):
        run_compare("--methods", "fedbiot", "--betas", "0.5", "--seeds", "0")


def test_methods_without_an_emulator_alone(run_compare, tmp_path):
    calls, results = run_compare("--methods", "zero_shot", "full_lora", "--seeds", "0", "0")
    assert calls == ["zero_shot-seed0", "full_lora-seed0"] and len(results) == 2
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 100


def test_means_and_deviations(compare):
    def cell(method, beta, seed, loss):
        scores = {"loss": loss, "token_accuracy": 0.5, "exact_match": loss / 10}
        costs = {"trainable_parameters": 7, "bytes_per_client_round": 1e6, "client_flops": 2e12, "server_flops": 0}
        return {
            "method": method,
            "beta": beta,
            "seed": seed,
            "zero_shot": {"loss": 5.0, "token_accuracy": 0.1, "exact_match": 0.1},
            "adap_emu": None,
            "adap_fu": scores,
            "seconds": 1,
            **costs,
        }

    rows = compare["aggregate"](
        [cell("fedbiot", 0.5, 0, 1.0), cell("fedbiot", 0.5, 1, 3.0), cell("fedot", 0.5, 0, 4.0)]
    )
    assert rows[0]["adap_fu"]["loss"] == (2.0, pytest.approx(2**0.5))
    assert rows[1]["adap_fu"]["loss"] == (4.0, 0.0)
    header, first, second = compare["table_cells"](rows)
    assert dict(zip(header, first, strict=True)) == {
        "method": "fedbiot",
        "beta": "0.5",
        "seeds": "2",
        "AdapEmu loss": "",
        "AdapFu loss": "2.000 ± 1.414",
        "AdapEmu exact match": "",
        "AdapFu exact match": "20.0 ± 14.1",
        "trained": "7",
        "bytes/round": "1.0 MB",
        "client TFLOPs": "2",
        "server TFLOPs": "0",
        "s": "1",
    }
    assert second[0] == "fedot" and "4.000" in second  # one seed has no deviation


def cell_with(method, zero_shot, adap_fu, seed=0, beta=None):
    """A cell's result of which the scores matter: loss and exact match."""
    scores = [{"loss": loss, "token_accuracy": 0.5, "exact_match": right} for loss, right in (zero_shot, adap_fu)]
    costs = {
        "trainable_parameters": 7,
        "bytes_per_client_round": 1,
        "client_flops": 1,
        "server_flops": 0,
        "seconds": 1,
    }
    result = {"task": "svamp", "method": method, "beta": beta, "seed": seed, "adap_emu": None}
    return result | {"zero_shot": scores[0], "adap_fu": scores[1]} | costs


def recovered(compare, cells):
    """The columns of the gain recovered, by method."""
    header, *lines = compare["table_cells"](compare["aggregate"](cells))
    return {line[0]: [line[i] for i, name in enumerate(header) if name.startswith("gain")] for line in lines}


def test_gain_recovered(compare):
    """Of what each seed's zero-shot starts from; below zero-shot it is negative."""
    cells = [
        cell_with("zero_shot", (3.0, 0.1), (3.0, 0.1)),
        cell_with("fedbiot", (3.0, 0.1), (2.0, 0.3), seed=0),
        cell_with("fedbiot", (4.0, 0.2), (3.5, 0.1), seed=1),
        cell_with("fedot", (3.0, 0.1), (3.5, 0.0)),
        cell_with("full_lora", (3.0, 0.1), (1.0, 0.5), seed=0),
        cell_with("full_lora", (4.0, 0.2), (3.0, 0.6), seed=1),
    ]
    assert recovered(compare, cells) == {
        "zero_shot": ["0%", "0%"],
        "fedbiot": ["50%", "12%"],  # 0.75 of 1.5 nats, 0.05 of 0.4
        "fedot": ["-33%", "-25%"],
        "full_lora": ["100%", "100%"],
    }
    # Without what it is a share of, or where that gained nothing, there is no column
    assert recovered(compare, cells[:4])["fedbiot"] == []
    assert recovered(compare, [*cells[:2], cell_with("full_lora", (3.0, 0.1), (2.0, 0.1))])["fedbiot"] == ["100%"]


def test_rows_of_scores(compare):
    full = cell_with("local_only", (3.0, 0.1), (2.0, 0.3), beta=0.5)
    full["adap_emu"] = {"loss": 2.5, "token_accuracy": 0.2}
    rows = compare["rows_of_scores"]([cell_with("zero_shot", (3.0, 0.1), (3.0, 0.1)), full])
    zero_shot = {"loss": 3.0, "metric": 0.1}
    assert rows == [
        {"task": "svamp", "method": "zero_shot", "beta": None, "seed": 0, "zero_shot": zero_shot, "adap_emu": None,
         "adap_fu": None},
        {"task": "svamp", "method": "alone", "beta": 0.5, "seed": 0, "zero_shot": zero_shot,
         "adap_emu": {"loss": 2.5, "metric": None}, "adap_fu": {"loss": 2.0, "metric": 0.3}},
    ]  # fmt: skip


def test_names_of_tasks(compare, tmp_path):
    """A recipe that is a task has its name, however it is named; any other the name of its folder."""
    for name, file in compare["TASKS"].items():
        path = ROOT / "recipes" / file
        assert path.is_file()
        for flags in (["--task", name], ["--config", str(path)]):
            args, _ = compare["parse_args"]([*flags, "--output_dir", str(tmp_path)])
            assert (args.task, args.config) == (name, path)
    other = str(ROOT / "recipes" / "gsm8k" / "llama2_7b.yaml")
    assert compare["parse_args"](["--config", other, "--output_dir", str(tmp_path)])[0].task == "gsm8k"


OTHERS = ("local_only", "fedot", "full_lora", "ceiling")


@pytest.mark.parametrize("method", ["fedbiot", *map(slow, OTHERS)])
def test_costs_of_a_real_run(compare, make_args, tokenizer, tmp_path, method):
    save_files(tmp_path, tokenizer)
    cell = compare["Cell"](method, 0.5, 0)
    summary = run_method(
        method,
        str(tmp_path / "base"),
        make_args(output_dir=str(tmp_path / str(cell)), eval_drift=True),
        {"north": sums(0, 8), "south": sums(8, 12)},
        public_dataset=sums(40, 50),
        eval_dataset=sums(50, 55),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    args = compare["argparse"].Namespace(output_dir=tmp_path, task="sums", drift=True)
    result = compare["read_cell"](cell, args)
    assert result["adap_fu"] == summary.adap_fu
    whole = method in ("full_lora", "ceiling")
    assert (result["adap_emu"] is None) == whole
    assert result["client_flops"] > 0 and (result["server_flops"] > 0) != whole
    assert [record["server_round"] for record in result["drift"]] == ([1, 2] if method == "fedbiot" else [])
    # Of 2 rounds; the answer of one client is about as large as what is sent of its LoRA.
    rounds = 2 * (1 if method == "local_only" else 2)
    expected = (summary.bytes["down"] + summary.bytes["up"]) / rounds
    assert result["bytes_per_client_round"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes, factor", [({"gradient_accumulation_steps": 3}, 3), slow({"fraction_train": 0.5}, 0.5)]
)
def test_flops_are_those_of_one_client(compare, make_args, tokenizer, tmp_path, changes, factor):
    save_files(tmp_path, tokenizer)
    flops = []
    for seed, settings in enumerate(({}, changes)):
        cell = compare["Cell"]("fedbiot", 0.5, seed)
        run_method(
            "fedbiot",
            str(tmp_path / "base"),
            make_args(output_dir=str(tmp_path / str(cell)), alignment_steps=0, initial_alignment_steps=0, **settings),
            {"north": sums(0, 8), "south": sums(8, 16)},
            eval_dataset=sums(50, 52),
        )
        args = compare["argparse"].Namespace(output_dir=tmp_path, task="sums", drift=False)
        flops.append(compare["read_cell"](cell, args)["client_flops"])
    assert flops[1] == pytest.approx(factor * flops[0])


def test_the_text_of_a_computed_start_counts(compare, make_args, tokenizer, tmp_path):
    save_files(tmp_path, tokenizer)
    cell = compare["Cell"]("fedbiot", 0.5, 0)
    run_method(
        "fedbiot",
        str(tmp_path / "base"),
        make_args(output_dir=str(tmp_path / str(cell)), alignment_init="closed_form", alignment_init_tokens=20),
        {"north": sums(0, 8)},
        public_dataset=sums(40, 60),
        eval_dataset=sums(50, 52),
        peft_config=LORA,
    )
    args = compare["argparse"].Namespace(output_dir=tmp_path, task="sums", drift=False)
    flops = compare["read_cell"](cell, args)["server_flops"]
    file = tmp_path / str(cell) / "summary.json"
    summary = json.loads(file.read_text())
    summary["settings"]["alignment_init_tokens"] = 100_000
    file.write_text(json.dumps(summary))
    assert flops < compare["read_cell"](cell, args)["server_flops"]
