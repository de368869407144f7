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
from fedbiot_trainer.engines.site import SiteLimits


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
    (tmp_path / "ddp.yaml").write_text("")
    settings = {"use_cpu": True, "max_local_steps": 3, "accelerate_config": str(tmp_path / "ddp.yaml")}
    assert read_settings(settings_of(tmp_path, **settings)) == settings


@pytest.mark.parametrize(
    "settings, error",
    [
        (
            {"per_device_train_batch_size": "four"},
            "`per_device_train_batch_size` is 'four', but it must be a whole number",
        ),
        ({"use_cpu": True, "bf16": True, "fp16": True}, "fp16"),
        ({"accelerate_config": "nowhere.yaml"}, "`accelerate_config` is 'nowhere.yaml', but there is no such file"),
    ],
    ids=["kind", "both", "launcher"],
)
def test_settings_with_which_a_site_could_not_train(tmp_path, settings, error):
    with pytest.raises((FileNotFoundError, ValueError), match=error):
        read_settings(settings_of(tmp_path, **settings))


@pytest.mark.parametrize("text, error", [("a: [", "which is no YAML"), ("- a", "which has no settings")])
def test_a_sites_file_that_is_none(tmp_path, text, error):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ValueError, match=error):
        read_settings(tmp_path / "site.yaml")
    with pytest.raises(FileNotFoundError, match="`config` is '.*gone.yaml', but there is no such file"):
        read_settings(tmp_path / "gone.yaml")


@pytest.mark.parametrize(
    "name, value", [("max_local_steps", "many"), ("min_examples", "200"), ("max_round_seconds", "soon")]
)
def test_limits_of_another_kind(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is '{value}', but it must be"):
        SiteLimits(**{name: value})


needs_nvflare = pytest.mark.usefixtures("nvflare")


@pytest.fixture
def nvflare():
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")


@needs_nvflare
def test_a_site_says_what_it_would_do(kit, tmp_path, capsys, monkeypatch):
    (tmp_path / "ddp.yaml").write_text("")
    launcher = str(tmp_path / "ddp.yaml")
    config = settings_of(tmp_path, use_cpu=True, max_package_gb=2.5, accelerate_config=launcher)
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

    with pytest.raises(
        ValueError, match=f"`folder` is '{kit / 'fedbiot'}', with which this site is taking part already"
    ):
        join(flags)  # the first one is this process
    join([*flags, "--folder", str(tmp_path / "other")])
    assert len(started) == 2


@needs_nvflare
@pytest.mark.parametrize(
    "flags, error",
    [
        (["--kit", "nowhere"], "nowhere', which has no startup/sub_start.sh, so it is no whole startup kit of a site"),
        (["--kit", "no where"], "no where', a path with white space, from which NVFlare cannot start its processes"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_site_that_cannot_join(kit, tmp_path, flags, error):
    with pytest.raises((FileNotFoundError, ValueError), match=error):
        join(["--kit", str(kit), "--data", str(tmp_path / "private.jsonl"), "--check_only", *flags])


@needs_nvflare
def test_a_site_with_too_few_examples_or_half_a_kit(kit, tmp_path):
    flags = ["--kit", str(kit), "--data", str(tmp_path / "private.jsonl"), "--check_only"]
    with pytest.raises(
        ValueError, match="`min_examples` is 100, but '.*' has 12, so this site would refuse each round"
    ):
        join([*flags, "--config", str(settings_of(tmp_path, use_cpu=True, min_examples=100))])
    (kit / "startup" / "client.key").unlink()
    with pytest.raises(FileNotFoundError, match="which has no startup/client.key, so it is no whole startup kit"):
        join(flags)
    (kit / "startup" / "client.key").write_text("")
    (kit / "local" / "resources.json").write_text("{")
    with pytest.raises(ValueError, match="whose local/resources.json is damaged"):
        join(flags)


@needs_nvflare
@pytest.mark.parametrize(
    "changes, error",
    [
        ({"port": 99_999}, "`port` is 99999, but ports are 1 to 65535"),
        ({"host": "not a host"}, "`host` 'not a host' or `administrator` .* cannot be"),
        ({"administrator": "bob"}, "or `administrator` 'bob' cannot be.* written as an email address"),
        ({"folder": "k its"}, "`output_dir` is '.*k its', a path with white space"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_kits_that_cannot_be(tmp_path, changes, error):
    from fedbiot_trainer.engines.nvflare.provision import provision

    changes = {"host": "localhost", "port": 8002, **changes}
    with pytest.raises(ValueError, match=error):
        provision(tmp_path / changes.pop("folder", "kits"), sites=["clinic"], **changes)
    assert list(tmp_path.iterdir()) == []  # kits that are there are left as they are


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
