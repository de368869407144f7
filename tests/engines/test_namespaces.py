"""Owner, sites and an outsider on machines of their own: a run, what crosses the line, and what nobody can do."""

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from conftest import assert_same
from namespaces import network, read_frames, tcp_streams, why_not
from safetensors.torch import load_file


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")

from machines import ADMINISTRATOR, HERE, NAMES, OUTSIDER, PORT, SITES, Federation, fedbiot, secrets, wait_for

from fedbiot_trainer.shared.lora_state import load_lora


pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def machines():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with network(NAMES) as made:
        yield made


@pytest.fixture(scope="module")
def federation(machines, tmp_path_factory, tokenizer):
    """A server and three sites that are connected, and what crossed the bridge since before it began."""
    made = Federation(machines, tmp_path_factory.mktemp("machines"), tokenizer)
    try:
        with ExitStack() as made.capture:
            made.frames = made.folder / "frames"
            made.capture.enter_context(machines.capture(made.frames))
            made.start_owner()
            for is_there in [made.join(site) for site in SITES]:
                wait_for(is_there, "the sites to register", 240)
            yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def served(federation):
    """A run, and all that crossed the bridge until its end."""
    run = federation.serve()
    assert run.end() == 0, run.said()[-3000:]
    federation.capture.close()
    run.frames = list(read_frames(federation.frames))
    return run


def test_a_run_of_machines_is_the_run_of_one_process(federation, served):
    clients = [f"{site}={federation.home(site) / 'secret.jsonl'}" for site in SITES]
    words = ["train", "--config", "run.yaml", "--output_dir", "whole", "--client_datasets", *clients]
    whole = federation.run(OUTSIDER, fedbiot(*words), cwd=federation.home("owner"))
    assert whole.returncode == 0, whole.stderr[-3000:]
    theirs = federation.home("owner") / "whole"
    assert_same(load_lora(served.output / "client_lora")[1], load_lora(theirs / "client_lora")[1])
    shutil.rmtree(theirs)  # it was told where the clients' text is
    assert all(set(record["client_losses"]) == set(SITES) for record in served.rounds())
    assert len(served.rounds()) == 3


def stretches(folder: Path) -> list[bytes]:
    """Bytes of every tensor that a folder holds, 32 in a row."""
    found = []
    for file in folder.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            data = tensor.contiguous().numpy().tobytes()
            found += [data[start : start + 32] for start in (0, len(data) // 2)]
    return [stretch for stretch in found if len(stretch) == 32 and len(set(stretch)) > 16]


def private(federation, served) -> list[bytes]:
    """What is not to be seen on the way."""
    texts = [text for site in SITES for text in secrets(site)["prompt"]]
    texts += [str(federation.home(site)) for site in SITES] + ["secret.jsonl"]
    tensors = stretches(served.output / "client_lora") + stretches(served.output / "package")
    assert len(tensors) > 20
    return [text.encode() for text in texts] + tensors


def test_nothing_that_crosses_the_bridge_can_be_read(federation, machines, served):
    words = private(federation, served)
    streams = list(tcp_streams(iter(served.frames)).values())
    assert sum(map(len, streams)) > 1e6
    seen = [*served.frames, *streams]
    assert not [word for word in words if any(word in data for data in seen)]


def test_what_is_sent_in_the_clear_would_have_been_seen(federation, machines, served):
    words = private(federation, served)
    (federation.home("north") / "clear").write_bytes(b"".join(words))
    server = (
        "import socket; s = socket.create_server(('', 9)); print('', flush=True); s.accept()[0].makefile('rb').read()"
    )
    client = "import socket, sys; socket.create_connection((sys.argv[1], 9)).sendall(open('clear', 'rb').read())"
    file = federation.folder / "clear-frames"
    with machines.capture(file):
        listening = federation.network.start(OUTSIDER, [sys.executable, "-u", "-c", server], stdout=-1)
        listening.stdout.readline()
        federation.run("north", [sys.executable, "-c", client, machines.addresses[OUTSIDER]], check=True)
        listening.communicate(timeout=60)
    streams = list(tcp_streams(read_frames(file)).values())
    assert all(any(word in stream for stream in streams) for word in words)


def test_every_connection_to_the_owner_begins_with_tls(machines, served):
    owner = machines.addresses["owner"]
    streams = tcp_streams(iter(served.frames))
    to_owner = {key: data for key, data in streams.items() if key[2:] == (owner, PORT)}
    assert {source for source, *_ in to_owner} == {machines.addresses[site] for site in SITES}
    assert all(data[:2] == b"\x16\x03" for data in to_owner.values())
    assert all(owner in (source, target) for source, _, target, _ in streams)  # no site to another


def outsider(federation, *words):
    tried = federation.run(OUTSIDER, [sys.executable, HERE / "outsider.py", *words], check=True)
    return json.loads(tried.stdout)


def test_the_owner_has_one_open_port_and_a_site_none(federation, machines):
    found = {name: outsider(federation, "ports", machines.addresses[name]) for name in ("owner", *SITES)}
    assert found == {"owner": [PORT]} | {site: [] for site in SITES}


def test_who_has_no_kit_gets_no_further_than_the_handshake(federation, machines):
    authority = federation.kits["owner"] / "startup" / "rootCA.pem"
    got = outsider(federation, "calls", machines.addresses["owner"], PORT, authority)
    assert got.pop("plain HTTP") in ("ConnectionResetError", "b''")
    assert {value for name, value in got.items() if name.startswith("TLS")} <= {
        "SSLError",
        "ConnectionResetError",
        "b''",
    }
    assert {value for name, value in got.items() if "gRPC" in name} == {"UNAVAILABLE"}


def start_client(federation, kit, name, script=("-m", "nvflare.private.fed.app.client.client_train")):
    """NVFlare's client with a kit, on north's machine."""
    settings = ["--set", "secure_train=true", f"uid={name}", "org=north", "config_folder=config"]
    words = [sys.executable, "-u", *script, "-m", kit, "-s", "fed_client.json", *settings]
    federation.start("north", words, f"{kit.name}.txt")
    return federation.home("north") / f"{kit.name}.txt"


FOR_ANOTHER = [
    ["south", "admin", "sys.shell", "ls"],
    ["south", "admin", "sys.shell", "cat startup/client.key"],
    ["south", "admin", "sys.report_env", ""],
    ["south", "admin", "train.shutdown", ""],
]
FOR_THE_OWNER = [
    ["server", "server_parent_listener", "get_clients", ""],
    ["server", "cellnet_agent", "stop", ""],
]


@pytest.mark.parametrize("gate", ["the owner's", "the site's"])
def test_a_site_has_nothing_of_another(federation, gate):
    """North's client is altered. NVFlare itself would bring south what it asks, and south would answer."""
    federation.network.kill("north")
    requests = FOR_ANOTHER + FOR_THE_OWNER
    if gate == "the site's":  # what an owner with an altered server could ask of it
        requests = FOR_ANOTHER
        open_gate(federation)
    kit = federation.kit("north")
    (kit / "requests.json").write_text(json.dumps(requests))
    (kit / "replies.json").unlink(missing_ok=True)
    start_client(federation, kit, "north", [HERE / "altered_client.py"])
    wait_for((kit / "replies.json").exists, "replies")
    replies = json.loads((kit / "replies.json").read_text())
    if gate == "the owner's":
        assert replies == [["timeout", "None"]] * len(requests)
        log = (federation.home("owner") / "server.txt").read_text()
        assert log.count("refused: north has sent what no site sends") >= len(requests)
    else:
        assert replies == [["ok", "invalid_request"]] * len(requests)
    assert any("client_train" in command for command in federation.network.processes("south").values())


def open_gate(federation):
    """Start the server anew without what stands between the sites."""
    federation.network.kill("owner")
    file = federation.kits["owner"] / "local" / "resources.json"
    resources = json.loads(file.read_text())
    resources["components"] = [part for part in resources["components"] if part["id"] != "fedbiot_gate"]
    file.write_text(json.dumps(resources))
    federation.start_owner()
    log = federation.home("owner") / "server.txt"
    before = len(log.read_text())
    wait_for(lambda: "Re-activate the client: south" in log.read_text()[before:], "south to come back", 180)


def test_a_site_cannot_take_another_name(federation):
    """North's certificate, with south's name."""
    kit = federation.home("north") / "posing"
    shutil.copytree(federation.kit("north"), kit)
    settings = kit / "startup" / "fed_client.json"
    settings.write_text(settings.read_text().replace('"fqsn": "north"', '"fqsn": "south"'))
    screen = start_client(federation, kit, "south")
    log = federation.home("owner") / "server.txt"
    refusal = "authenticated as 'north' but claimed endpoint 'south' requires identity 'south'"
    wait_for(lambda: refusal in log.read_text(), "a refusal")
    assert "Successfully registered" not in screen.read_text()


def test_a_kit_of_another_federation_does_not_register(federation):
    """The same names and addresses, and another authority."""
    other = federation.provision("other")["north"]
    kit = federation.home("north") / "other"
    shutil.copytree(other, kit)
    screen = start_client(federation, kit, "north")
    wait_for(lambda: "CERTIFICATE_VERIFY_FAILED" in screen.read_text(), "a refusal")
    assert "Successfully registered" not in screen.read_text()


OPEN_SESSION = """
import os, sys
from fedbiot_trainer.engines.nvflare.administrator import open_session
try:
    open_session(sys.argv[1], 20.0)
    print("open")
except Exception as error:
    print(type(error).__name__)
sys.stdout.flush()
os._exit(0)  # NVFlare's threads go on
"""


def test_a_site_is_no_administrator(federation):
    """It cannot so much as open a session, and so start nothing at others."""
    kit = federation.home("north") / ADMINISTRATOR
    shutil.copytree(federation.kits[ADMINISTRATOR], kit)
    words, log = [sys.executable, "-c", OPEN_SESSION, kit], federation.home("owner") / "server.txt"
    assert federation.run("north", words).stdout.splitlines()[-1] == "open"  # it is not the machine that is refused
    sessions = log.read_text().count("Created user session")
    for file in ("client.crt", "client.key"):
        shutil.copy(federation.kit("north") / "startup" / file, kit / "startup" / file)
    assert federation.run("north", words).stdout.splitlines()[-1] == "FLCommunicationError"
    assert log.read_text().count("Created user session") == sessions > 0


def test_the_owner_has_nothing_of_the_sites(federation):
    control = federation.home("owner") / "control.zip"
    with ZipFile(control, "w", ZIP_DEFLATED) as archive:
        archive.writestr("log", f"{federation.home('north')} has {secrets('north')['prompt'][0]}")
    assert len(federation.leaks()) == 2
    control.unlink()
    assert federation.leaks() == []
