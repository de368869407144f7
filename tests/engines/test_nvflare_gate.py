"""Which of NVFlare's messages pass, and which sites it has heard of lately. No process is started."""

import pytest


pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedbiot-trainer[nvflare]'")

from nvflare.apis.fl_constant import ReturnCode
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessagePropKey, MessageType
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, STREAM_DATA_TOPIC, StreamHeaderKey

from fedbiot_trainer.engines.nvflare import owner, presence
from fedbiot_trainer.engines.nvflare.gate import SITE_TOPICS, OwnerGate, keep_topics
from fedbiot_trainer.engines.nvflare.presence import Presence


JOB = "5b1e8f8e"


def message(origin, destination, channel, topic, certificate="north", kind=MessageType.REQ, streamed=False):
    headers = {
        MessageHeaderKey.ORIGIN: origin,
        MessageHeaderKey.DESTINATION: destination,
        MessageHeaderKey.MSG_TYPE: kind,
        MessageHeaderKey.CHANNEL: STREAM_CHANNEL if streamed else channel,
        MessageHeaderKey.TOPIC: STREAM_DATA_TOPIC if streamed else topic,
    }
    if streamed:
        headers |= {StreamHeaderKey.CHANNEL: channel, StreamHeaderKey.TOPIC: topic}
    made = Message(headers)
    if certificate is not None:
        made.set_prop(MessagePropKey.COMMON_NAME, certificate)
    return made


@pytest.mark.parametrize(
    "sent",
    [
        message("north", "server", "task", "register"),
        message("north", "server", "task", "heart_beat"),
        message("north", "server", "admin", "admin", kind=MessageType.REPLY),
        message(f"north.{JOB}", f"server.{JOB}", "server_command", "get_task", streamed=True),
        message(f"north.{JOB}", f"server.{JOB}", "server_command", "submit_update", streamed=True),
        message(f"north.{JOB}", f"server.{JOB}", "return_only", "aux_communication:fedbiot.presence", streamed=True),
        message("_admin_1", "server", "hci_channel", "command", certificate="owner@fedbiot.org"),
        message(f"server.{JOB}", f"south.{JOB}", "aux_communication", "end", certificate=None, streamed=True),
    ],
)
def test_what_a_run_needs_passes(sent):
    assert OwnerGate().check(sent) is None


@pytest.mark.parametrize(
    "sent",
    [
        message("north", "south", "admin", "sys.shell"),
        message("north", "south", "admin", "sys.shell", streamed=True),
        message("north", f"south.{JOB}", "aux_communication", "fedbiot.presence"),
        message("north", "owner@fedbiot.org", "admin", "admin"),
        message("north", "south", "return_only", "x", kind=MessageType.REPLY),
        message("south", "server", "task", "heart_beat"),  # with north's certificate
        message("server", "south", "admin", "sys.shell"),
        message("north", "server", "hci_channel", "command"),
        message("north", "server", "server_parent_listener", "update_run_status"),
        message("north", "server", "cellnet_agent", "stop"),
        message("north", "server", "cellnet.channel", "bulk"),
        message(f"north.{JOB}", f"server.{JOB}", "server_command", "abort", streamed=True),
        message(f"north.{JOB}", f"server.{JOB}", "server_command", "abort"),
        message("north", "server", "admin", "admin", streamed=True),
    ],
)
def test_what_no_site_sends_is_refused(sent):
    assert OwnerGate().check(sent) is not None


def test_a_site_keeps_the_commands_of_a_job():
    processors = dict.fromkeys([*SITE_TOPICS, "sys.shell", "sys.report_env", "train.shutdown", "info.show_errors"])
    keep_topics(processors, SITE_TOPICS)
    assert processors.keys() == SITE_TOPICS


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def sites():
    """Three sites, what they answer, and the time."""
    codes, clock = dict.fromkeys(["north", "south", "west"], ReturnCode.OK), Clock()
    return Presence(codes, lambda names, seconds: codes, clock), codes, clock


@pytest.mark.parametrize(
    "code, most", [(ReturnCode.ERROR, presence.UNREACHABLE_SECONDS), (ReturnCode.TIMEOUT, presence.SILENT_SECONDS)]
)
def test_a_site_of_which_nothing_is_heard_is_gone_until_it_is(sites, code, most):
    found, codes, clock = sites
    found.look()
    codes["west"] = code
    for seconds in (most - 1, 2):
        assert all(found.is_there(name) for name in codes)
        clock.now += seconds
        found.look()
    assert [name for name in codes if found.is_there(name)] == ["north", "south"]
    codes["west"] = ReturnCode.OK
    found.look()
    assert found.is_there("west")


def test_a_site_may_take_longer_to_start(sites):
    found, codes, clock = sites
    codes["west"] = ReturnCode.ERROR
    clock.now += presence.START_SECONDS + presence.UNREACHABLE_SECONDS - 1
    found.look()
    assert found.is_there("west")
    clock.now += 2
    assert not found.is_there("west")


def test_a_site_that_fetches_nothing_is_given_up(sites, monkeypatch):
    """Not one that is still to start, or that has fetched its request and is at it."""
    found, codes, _ = sites
    codes["west"] = ReturnCode.ERROR
    found.look()
    controller = owner.OwnerController("module:function")
    controller._presence = found
    revoked: list[str] = []
    monkeypatch.setattr(controller, "sites", lambda: list(codes))
    monkeypatch.setattr(controller, "_revoked", lambda: revoked)
    asking = owner._Asking("fit", {}, None)
    asking.fetched.add("north")
    assert controller._given_up(dict.fromkeys(codes), asking) == {}
    asking._started -= owner.FETCH_SECONDS + 1
    given_up = {"south": "ConnectionError: it does not fetch the request"}
    assert controller._given_up(dict.fromkeys(codes), asking) == given_up
    revoked.append("north")
    assert controller._given_up(dict.fromkeys(codes), asking) == given_up | {"north": owner.REVOKED}


def test_who_takes_no_part_is_not_there(sites):
    assert not sites[0].is_there("nobody")
