import re

import pytest
from trl import SFTConfig

from fedbiot_trainer.cli.train import make_parser
from fedbiot_trainer.config.settings import GROUPS, heading
from fedbiot_trainer.config.training_arguments import TREATMENTS, Used
from fedbiot_trainer.shared.selection import Selection


HEADINGS = [
    "Where the texts come from",
    "The split",
    "The federation",
    "How the clients' updates become the next client LoRA",
    "The alignment of the emulator on public text",
    "How one training set is split among simulated clients",
    "Evaluation and output",
    "The model and the client LoRA",
    "The clients' training",
]


@pytest.fixture(params=[80, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_our_flags_come_first_in_groups(columns, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args_and_config(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\S.*):\n(?=\n?  \S)", text.partition("Where the")[2], re.MULTILINE) == HEADINGS[1:]
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    ours = [name for group in reversed(GROUPS) for name in group.__dataclass_fields__]
    assert [name for name in shown if name in ours] == ours
    assert shown.index("public_dataset_name") < shown.index(ours[0])
    assert shown.index(ours[-1]) < shown.index("lora_r") < shown.index("learning_rate")
    lines = text[text.index("Where the texts") :].splitlines()
    assert max(len(line) for line in lines if "https://" not in line) < columns  # TRL's have addresses


def test_flags_of_trl_are_those_that_have_an_effect():
    shown = re.findall(r"^  --(\w+)", make_parser().format_help(), re.MULTILINE)
    trl = [name for name in shown if name in SFTConfig.__dataclass_fields__ and name in TREATMENTS]
    assert "learning_rate" in trl and all(isinstance(TREATMENTS[name], Used) for name in trl)
    assert len(shown) == len(set(shown))


def test_flags_that_are_not_shown_are_taken(tmp_path):
    flags = ["--task", "demo", "--output_dir", str(tmp_path), "--save-steps", "7", "--use_cpu", "true"]
    _, args, _ = make_parser().parse_args_and_config(flags)
    assert list(args.without_effect()) == ["save_steps"]


def test_best_round_from_the_command_line(tmp_path):
    flags = (
        "--load_best_model_at_end true --metric_for_best_model adap_emu_loss --plug_in_scales 0.5 1 --task demo --use_cpu true "
        "--output_dir"
    )
    _, args, _ = make_parser().parse_args_and_config([*flags.split(), str(tmp_path)])
    assert args.load_best_model_at_end and Selection.of(args) == Selection(
        "eval_adap_emu_loss", greater_is_better=False
    )
    assert args.without_effect() == {} and args.plug_in_scales == [0.5, 1.0]


def test_wrong_flag_is_told_without_all_the_others(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args_and_config(["--task", "demo", "--num_rounds", "many"])
    text = capsys.readouterr().err
    assert "argument --num_rounds/--num-rounds: invalid int value: 'many'" in text and len(text.splitlines()) < 5


def test_heading_is_a_first_sentence():
    for group in GROUPS:
        assert heading(group) and (group.__doc__ or "").split()[0] == heading(group).split()[0]
