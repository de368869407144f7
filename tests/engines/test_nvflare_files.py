"""What NVFlare is given: startup kits, and the folder of a job. No process is started."""

import base64
import json
import shutil

import pytest
import yaml


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")

from cryptography import x509
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal

from fedbiot_trainer.engines.errors import SiteError
from fedbiot_trainer.engines.nvflare import executor
from fedbiot_trainer.engines.nvflare.administrator import open_session
from fedbiot_trainer.engines.nvflare.executor import SiteExecutor, await_owner, read_command
from fedbiot_trainer.engines.nvflare.gate import OwnerGate, SiteGate
from fedbiot_trainer.engines.nvflare.job import write_job
from fedbiot_trainer.engines.nvflare.owner import MESSAGE_SECONDS, TASK, OwnerController
from fedbiot_trainer.engines.nvflare.parts import PART, split, views
from fedbiot_trainer.engines.nvflare.provision import CONTROLLER, EXECUTOR, check_site_kit, provision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def kits(folder):
    return provision(folder, "models.example.org", 8443, ["north", "south-2"], "admin@example.org")


def read(path):
    return json.loads(path.read_text())


def test_each_party_has_a_kit_with_its_own_key(kits):
    assert list(kits) == ["owner", "north", "south-2", "admin@example.org"]
    keys = [next((kit / "startup").glob("*.key")).read_text() for kit in kits.values()]
    assert len(set(keys)) == 4
    certificate = x509.load_pem_x509_certificate((kits["north"] / "startup" / "client.crt").read_bytes())
    assert certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == "north"
    certificate = x509.load_pem_x509_certificate((kits["owner"] / "startup" / "server.crt").read_bytes())
    hosts = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "models.example.org" in hosts.get_values_for_type(x509.DNSName)


def test_nobody_else_on_the_machine_can_read_keys(kits):
    assert kits["owner"].parents[1].stat().st_mode & 0o077 == 0
    assert (kits["owner"].parents[1] / "state" / "cert.json").is_file()


def test_the_owner_has_one_port_and_all_connect_to_it(folder, kits):
    owner = yaml.safe_load((folder / "project.yml").read_text())["participants"][0]
    assert owner["fed_learn_port"] == owner["admin_port"] == 8443
    site = read(kits["north"] / "startup" / "fed_client.json")
    assert site["servers"][0]["service"]["target"] == "models.example.org:8443"
    assert site["client"]["connection_security"] == "mtls"
    admin = read(kits["admin@example.org"] / "startup" / "fed_admin.json")["admin"]
    assert (admin["host"], admin["port"]) == ("models.example.org", 8443)


def test_a_site_runs_our_executor_only_and_sends_no_logs(kits):
    resources = read(kits["north"] / "local" / "resources.json")
    assert resources["class_allow_list"] == [EXECUTOR]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    assert "log_streamer" not in json.dumps(resources["components"])
    rights = read(kits["north"] / "local" / "authorization.json")["permissions"]
    assert list(rights) == ["project_admin"]
    assert rights["project_admin"]["shell_commands"] == rights["project_admin"]["byoc"] == "none"


@pytest.mark.parametrize(
    "change",
    [
        {"class_allow_list": [EXECUTOR, "nvflare.app_common.executors.task_script_runner.TaskScriptRunner"]},
        {"class_list_enforcement_mode": "warn"},
        {"components": []},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_kit_that_lets_the_owner_do_more_at_a_site_is_refused(kits, tmp_path, change):
    assert check_site_kit(kits["north"]) == "north"
    file = shutil.copytree(kits["north"], tmp_path / "kit") / "local" / "resources.json"
    file.write_text(json.dumps(read(file) | change))
    with pytest.raises(ValueError, match="the owner could do more at this site than train"):
        check_site_kit(tmp_path / "kit")


def test_a_site_waits_for_a_lost_message_as_long_as_one_may_take(kits):
    """NVFlare's own 300 s keep a site out of rounds, and are too short for a large LoRA on a slow line."""
    resources = read(kits["north"] / "local" / "resources.json")
    assert resources["client"]["communication_timeout"] == MESSAGE_SECONDS < 300
    controller, context = OwnerController("a:b"), FLContext()
    controller._fl_ctx = context
    controller.expect(160_000_000)
    assert context.get_prop(FLContextKey.MIN_GET_TASK_TIMEOUT) == MESSAGE_SECONDS + 320


def test_what_provision_names_is_there(kits):
    for name, gate in (("owner", OwnerGate), ("north", SiteGate)):
        paths = [part["path"] for part in read(kits[name] / "local" / "resources.json")["components"]]
        assert f"{gate.__module__}.{gate.__name__}" in paths


def test_a_site_that_joins_later_leaves_the_other_kits_good(folder, kits):
    again = provision(folder, "models.example.org", 8443, ["north", "south-2", "west"], "admin@example.org")
    for name in ("north", "west"):
        authority = again[name] / "startup" / "rootCA.pem"
        assert authority.read_text() == (kits["owner"] / "startup" / "rootCA.pem").read_text()
    assert again["north"] != kits["north"]


@pytest.mark.parametrize(
    "sites, match",
    [(["a b"], "'a b'"), (["owner"], "'owner'"), (["server"], "'server': a name"), (["a", "a"], "twice")],
)
def test_names_that_cannot_be_used(tmp_path, sites, match):
    with pytest.raises(ValueError, match=match):
        provision(tmp_path, "localhost", 8443, sites)


def test_a_job_names_our_classes_and_no_site(tmp_path):
    job = write_job(tmp_path / "job", "package.module:function", "argument", min_sites=2)
    meta = read(job / "meta.json")
    assert (meta["deploy_map"], meta["min_clients"]) == ({"app": ["@ALL"]}, 2)
    assert sorted(path.name for path in job.rglob("*")) == [
        "app", "config", "config_fed_client.json", "config_fed_server.json", "meta.json",
    ]  # fmt: skip
    server, client = (read(job / "app" / "config" / f"config_fed_{who}.json") for who in ("server", "client"))
    workflow = server["workflows"][0]
    assert workflow["path"] == CONTROLLER == f"{OwnerController.__module__}.{OwnerController.__name__}"
    assert workflow["args"] == {
        "function": "package.module:function",
        "argument": base64.b64encode(b"argument").decode(),
    }
    [ours] = client["executors"]
    assert ours["executor"]["path"] == EXECUTOR == f"{SiteExecutor.__module__}.{SiteExecutor.__name__}"
    assert ours["tasks"] == [TASK]


def test_a_site_says_itself_what_it_runs(tmp_path):
    with pytest.raises(SiteError, match="has no `fedbiot_site.json`"):
        read_command(tmp_path)
    file = tmp_path / "fedbiot_site.json"
    file.write_text("{")
    with pytest.raises(SiteError, match="is no JSON"):
        read_command(tmp_path)
    for wrong in ({}, [], {"command": "python -m site"}, {"command": []}, {"command": ["python", 3]}):
        file.write_text(json.dumps(wrong))
        with pytest.raises(SiteError, match="has no `command`"):
            read_command(tmp_path)
    file.write_text(json.dumps({"command": ["python", "-m", "site"]}))
    assert read_command(tmp_path) == ["python", "-m", "site"]


class Engine:
    """Of a site whose owner answers with these codes, one after the other."""

    def __init__(self, *codes):
        self.codes, self.aborted = list(codes), Signal()

    def send_aux_request(self, targets, topic, request, timeout, fl_ctx, optional):
        assert (targets, topic, request["__headers__"]["__task_id__"]) == (["server"], "__task_check__", "of-a-task")
        code = self.codes.pop(0)
        if not self.codes:
            self.aborted.trigger(True)
        return {} if code is None else {"server": make_reply(code)}


@pytest.mark.parametrize(
    "codes, asked",
    [
        ([ReturnCode.OK, "more"], 1),
        ([ReturnCode.TIMEOUT, ReturnCode.COMMUNICATION_ERROR, ReturnCode.OK, "more"], 3),
        ([ReturnCode.TIMEOUT, ReturnCode.TASK_UNKNOWN, "more"], 2),  # the round went on without the site
        ([None, "more"], 1),
        ([ReturnCode.TIMEOUT, ReturnCode.TIMEOUT], 2),  # then the run is ended
    ],
)
def test_an_answer_waits_for_a_connection(codes, asked, monkeypatch):
    """NVFlare itself sends it when its question times out, and then waits for what got lost."""
    monkeypatch.setattr(executor, "RETRY_SECONDS", 0.0)
    engine, context = Engine(*codes), FLContext()
    context.get_engine = lambda: engine
    context.set_prop(FLContextKey.TASK_ID, "of-a-task", private=True, sticky=False)
    await_owner(context, engine.aborted)
    assert len(codes) - len(engine.codes) == asked


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART])
def test_parts_of_a_payload(size):
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    parts = split(payload)
    assert all(len(part) <= PART for part in parts)
    assert b"".join(views(parts)) == payload


@pytest.mark.parametrize("wrong", [None, "text", {"a": 1}, [1], ["text"], [[1.0]]])
def test_what_is_no_payload(wrong):
    with pytest.raises(TypeError, match="list of bytes"):
        views(wrong)


def test_a_server_that_is_not_there(kits, tmp_path):
    """The administrator's name is that of the kit, not of its folder."""
    kit = shutil.copytree(kits["admin@example.org"], tmp_path / "kit")
    with pytest.raises(
        ConnectionError, match="whose server has not answered for 2 s. Start it, by `startup/start.sh`"
    ):
        open_session(kit, timeout=2)
