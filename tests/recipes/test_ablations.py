import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "smollm2" / "ablations.py"

# Stands in for `python fedbiot_sft.py`: AdapFu's loss is 1, plus a tenth of the seed, plus the alignment learning rate.
RUN = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = Path(flags["--output_dir"])
with (folder.parents[1] / "calls.txt").open("a") as file:
    file.write(f"{folder.parent.name} {flags['--seed']} {flags['--emulator_drop_ratio']}\\n")
loss = 1 + int(flags["--seed"]) / 10 + float(flags.get("--alignment_learning_rate", 0))
scores = {"loss": loss, "exact_match": 0.25}
summary = {
    "zero_shot": scores, "adap_emu": scores, "adap_fu": scores, "rounds": 0,
    "bytes": {"once_per_client": 0, "down": 0, "up": 0},
    "parameters": {"full": 100, "adap_emu": 50, "adapter_layers": 20, "trainable_client": 10, "trainable_server": 9,
                   "client_share": 0.5},
    "seconds": {"total": 3.0}, "split": {"num_layers": 8, "kept": [0], "dropped": [1], "adapter_layers": [7]},
    "num_public_examples": 0,
}
names = ("processes", "num_examples", "tokens_per_example", "initial_alignment", "settings", "peft_config", "versions")
(folder / "summary.json").write_text(json.dumps(summary | {name: {} for name in names}))
"""


@pytest.fixture(scope="module")
def ablations():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def run(ablations, tmp_path, capsys):
    """Run the script. Gives what it printed."""
    (tmp_path / "launcher.py").write_text("import sys\n" + RUN)

    def run(*flags):
        launcher = ["--launcher", f"{sys.executable} {tmp_path / 'launcher.py'}"]
        ablations["main"](["--task", "svamp", "--output_dir", str(tmp_path / "out"), *launcher, *flags])
        return capsys.readouterr().out

    return run


def test_one_change_at_a_time(run, tmp_path):
    flags = ("--seeds", "0", "1", "--beta", "0.4", "--arms", "alignment learning rate 2e-3", "4 adapter layers on top")
    shown = run(*flags)
    calls = sorted((tmp_path / "out" / "calls.txt").read_text().splitlines())
    arms = ("4_adapter_layers_on_top", "alignment_learning_rate_2e-3", "base")
    assert calls == [f"{arm} {seed} 0.4" for arm in arms for seed in (0, 1)]
    rows = json.loads((tmp_path / "out" / "ablations.json").read_text())
    assert [(row["arm"], row["seed"]) for row in rows[:2]] == [("base", 0), ("base", 1)] and len(rows) == 6
    assert rows[0]["adap_fu"] == {"loss": 1.0, "metric": 0.25}
    # Against the base at the same seed: the seeds' own difference, 0.1, is not in the spread.
    changed = next(line for line in shown.splitlines() if line.startswith("| alignment learning"))
    assert "| 1.052 ± 0.071 | +0.002 ± 0.000 |" in changed
    assert (tmp_path / "out" / "ablations.png").stat().st_size > 100
    assert (tmp_path / "out" / "ablations.md").read_text() in shown

    run(*flags)  # nothing is run twice
    assert sorted((tmp_path / "out" / "calls.txt").read_text().splitlines()) == calls


def test_unknown_arm_is_refused_before_any_run(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run("--arms", "better text")
    said = capsys.readouterr().err
    assert end.value.code == 2 and "better text" in said and "4 adapter layers on top" in said
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(run):
    with pytest.raises(
        SystemExit, match="(?s)'base' was not finished, the same command goes on from here: .*missing.py"
    ):
        run("--launcher", f"{sys.executable} missing.py")


@pytest.mark.parametrize("task", ["svamp", "xquad", "medquad", "gsm8k", "code"])
def test_each_arm_changes_what_the_recipe_says(ablations, task):
    arms = ablations["arms"](task)
    config = {"num_adapter_layers_bottom": 0, **yaml.safe_load((SCRIPT.parent / f"{task}.yaml").read_text())}
    for name, flags in arms.items():
        values = dict(zip(flags[::2], flags[1::2], strict=False))
        same = [flag for flag, value in values.items() if str(config.get(flag[2:])) == value]
        assert not values or len(same) < len(values), f"{name} changes nothing in {same}"
