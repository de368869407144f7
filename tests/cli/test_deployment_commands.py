"""What `fedbiot provision`, `serve` and `join` say before anything is started."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import save_files, sums

from fedbiot_trainer.cli.join import main as join
from fedbiot_trainer.cli.join import make_site, read_settings
from fedbiot_trainer.cli.main import main
from fedbiot_trainer.cli.revoke import main as revoke
from fedbiot_trainer.cli.serve import main as serve
from fedbiot_trainer.cli.status import main as status
from fedbiot_trainer.cli.stop import main as stop
from fedbiot_trainer.engines.errors import check_installed
from fedbiot_trainer.engines.nvflare.administrator import ServedRun


@pytest.mark.parametrize("command", ["provision", "serve", "join", "status", "stop", "revoke"])
def test_an_engine_that_is_not_installed_is_named(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nvflare", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith(
        f"fedbiot {command}: error: This needs nvflare, which is not installed: `pip install 'fedbiot-trainer[nvflare]'`.\n"
    )


def test_what_is_installed_is_not_refused():
    check_installed("json", "json")


@pytest.fixture
def kit(tmp_path):
    """Of the site `clinic`, in a folder that its administrator has named otherwise."""
    from fedbiot_trainer.engines.nvflare.provision import provision

    sums(0, 4).to_json(tmp_path / "private.jsonl")
    made = provision(tmp_path / "kits", "localhost", 8002, ["clinic"])["clinic"]
    return made.rename(tmp_path / "from-the-owner")


def settings_of(tmp_path, **settings):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "site.yaml"


@pytest.mark.parametrize("name", ["learning_rate", "num_rounds", "trust_remote_code", "output_dir", "max_steps"])
def test_a_site_may_not_set(tmp_path, name):
    with pytest.raises(
        ValueError, match=f"which sets {name}, but that is not a site's to decide. It may set accelerate_config"
    ):
        read_settings(settings_of(tmp_path, **{name: 1}))


def test_a_sites_yaml(tmp_path):
    assert read_settings(None) == read_settings(settings_of(tmp_path)) == {}
    settings = {"use_cpu": True, "max_local_steps": 3, "accelerate_config": "ddp.yaml"}
    assert read_settings(settings_of(tmp_path, **settings)) == settings


needs_nvflare = pytest.mark.usefixtures("nvflare")


@pytest.fixture
def nvflare():
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")


@needs_nvflare
def test_a_site_says_what_it_would_do(kit, tmp_path, capsys, monkeypatch):
    config = settings_of(tmp_path, use_cpu=True, max_package_gb=2.5, accelerate_config="ddp.yaml")
    flags = ["--kit", str(kit), "--data", str(tmp_path / "private.jsonl"), "--config", str(config)]
    join([*flags, "--check_only"])
    said = capsys.readouterr().out
    assert not (kit / "local" / "fedbiot_site.json").exists() and not (kit / "fedbiot" / "site.json").exists()

    started = []
    monkeypatch.setattr("os.execve", lambda *args: started.append(args[1]))
    join(flags)
    assert capsys.readouterr().out == said and started == [[str(kit / "startup" / "sub_start.sh"), "--once"]]
    assert f"site clinic: 12 examples of {tmp_path / 'private.jsonl'}" in said and "at most 2.5 GB" in said
    command = json.loads((kit / "local" / "fedbiot_site.json").read_text())["command"]
    assert command[1:4] == ["-m", "accelerate.commands.launch", "--config_file"]
    site = make_site(command[-1])
    assert (site.name, site.limits.max_package_gb, site.settings) == ("clinic", 2.5, {"use_cpu": True})
    assert len(site.train_dataset) == 12


@needs_nvflare
@pytest.mark.parametrize(
    "flags, error",
    [
        (["--kit", "nowhere"], "`kit` is 'nowhere', but that is no startup kit of a site"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_site_that_cannot_join(kit, tmp_path, flags, error):
    with pytest.raises((FileNotFoundError, ValueError), match=error):
        join(["--kit", str(kit), "--data", str(tmp_path / "private.jsonl"), "--check_only", *flags])


@needs_nvflare
@pytest.mark.parametrize(
    "flags, error",
    [
        (["--kit", "nowhere"], "`kit` is 'nowhere', but that is no startup kit of an administrator"),
        ([], "`kit` is 'None'"),
        (
            ["--client_datasets", "a=a.jsonl"],
            "`client_datasets` is .*, but the clients have their text at their sites",
        ),
        (["--dataset_name", "a.jsonl"], "`dataset_name` is a.jsonl, but the clients have their text at their sites"),
        (["--task", "demo"], "`task` is demo, but the clients"),
        (["--max_train_samples", "3"], "`max_train_samples` is 3, but the clients have their text"),
        (["--method", "fedot"], "`method` is 'fedot' and `plan_only` is False, but what is served"),
        (["--plan_only", "true"], "`plan_only` is True, but what is served is a run of FedBiOT"),
        (["--num_adapter_layers", "0"], "`num_adapter_layers` is 0"),
    ],
)
def test_a_run_that_cannot_be_served(tmp_path, tokenizer, flags, error):
    save_files(tmp_path, tokenizer, public=sums(0, 4), test=sums(4, 6))
    given = ["--model_name_or_path", str(tmp_path / "base"), "--public_dataset_name", str(tmp_path / "public.jsonl")]
    given += [
        "--eval_dataset_name",
        str(tmp_path / "test.jsonl"),
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
        "true",
    ]
    with pytest.raises((FileNotFoundError, ValueError), match=error):
        serve([*given, *flags])


@needs_nvflare
@pytest.mark.parametrize("command", [status, stop, revoke], ids=lambda command: command.__module__)
def test_commands_of_the_owner_need_its_kit(kit, command):
    with pytest.raises(FileNotFoundError, match=f"`kit` is '{kit}', but that is no startup kit of an administrator"):
        command(["--kit", str(kit), *(["north"] if command is revoke else [])])


def test_a_kit_serves_one_run_at_a_time(tmp_path):
    assert ServedRun.find(tmp_path) is None
    first = ServedRun.begin(tmp_path, tmp_path / "first")
    assert ServedRun.find(tmp_path) == first and not first.is_served  # this is not `fedbiot serve`
    with subprocess.Popen(
        ["sh", "-c", "echo; read line", "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        first.pid = other.pid
        first.save()
        with pytest.raises(
            ValueError, match=f"with which process {other.pid} serves the run of '{tmp_path / 'first'}'"
        ):
            ServedRun.begin(tmp_path, tmp_path / "second")
        other.stdin.close()
    second = ServedRun.begin(tmp_path, tmp_path / "second")  # the other has ended
    assert not second.was_stopped
    told = ServedRun.find(tmp_path)
    told.is_stopped = True
    told.save()
    assert second.was_stopped
