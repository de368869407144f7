"""
What one party may ask of another by NVFlare's messages, beside what its certificate says.

NVFlare's server checks who sends a message, and brings it to whom it is for. A site's client does what it is told there, and checks
no rights unless the message itself says so. With a client that was altered, a site could so read another's files, and an owner
with an altered server those of all. These components, which NVFlare loads by a kit's `local/resources.json`, let pass what a run
needs.
"""

from collections.abc import Iterable

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import CellChannel, CellChannelTopic, MessageHeaderKey, MessagePropKey, MessageType
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.download_service import OBJ_DOWNLOADER_CHANNEL
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.private.defs import TrainingTopic


# Channels and topics of a site's requests. What stands in parts in the stream's messages is named in their headers.
_TO_SERVER = {
    CellChannel.SERVER_MAIN: {
        CellChannelTopic.Challenge, CellChannelTopic.Register, CellChannelTopic.HEART_BEAT, CellChannelTopic.Quit,
        CellChannelTopic.REPORT_JOB_FAILURE,
    },
    CellChannel.CELLNET: {CellChannelTopic.Bye},
}  # fmt: skip
_ANY: set[str] = set()
_TO_JOB: dict[str, set[str]] = {
    CellChannel.SERVER_COMMAND: {ServerCommandNames.GET_TASK, ServerCommandNames.SUBMIT_UPDATE},
    CellChannel.AUX_COMMUNICATION: _ANY,
    CellChannel.RETURN_ONLY: _ANY,  # replies that are streamed
    CellChannel.CELLNET: {CellChannelTopic.Bye},
    OBJ_DOWNLOADER_CHANNEL: _ANY,  # large arrays
    STREAM_CHANNEL: {STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC},
}
# What a site's client does for the server: it starts and ends its part of a job.
SITE_TOPICS = {
    TrainingTopic.CHECK_RESOURCE, TrainingTopic.CANCEL_RESOURCE, TrainingTopic.DEPLOY, TrainingTopic.START_JOB,
    TrainingTopic.ABORT, TrainingTopic.ABORT_TASK, TrainingTopic.NOTIFY_JOB_STATUS, TrainingTopic.DELETE_RUN,
    TrainingTopic.CHECK_STATUS,
}  # fmt: skip


class OwnerGate(FLComponent):
    """At the server: a site speaks in its own name, to the server and its jobs alone, and of what a run needs."""

    def handle_event(self, event_type: str, fl_ctx: FLContext):
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            fl_ctx.get_engine().cell.core_cell.add_incoming_filter("*", "*", self.check)

    def check(self, message: Message) -> Message | None:
        """NVFlare's filter: what it gives is the answer, and the message goes no further."""
        name = message.get_prop(MessagePropKey.COMMON_NAME)  # of the certificate; the server's own processes have none
        if name is None or "@" in name or _may_pass(name, message):  # an administrator's name is an email address
            return None
        self.logger.error(f"refused: {name} has sent what no site sends")
        return make_reply(CellReturnCode.AUTHENTICATION_ERROR, "a site may not send this")


def _may_pass(site: str, message: Message) -> bool:
    header = message.get_header
    origin, destination = header(MessageHeaderKey.ORIGIN), header(MessageHeaderKey.DESTINATION)
    if FQCN.get_root(origin) != site or FQCN.get_root(destination) != FQCN.ROOT_SERVER:
        return False
    if header(MessageHeaderKey.MSG_TYPE) != MessageType.REQ:
        return True
    channel, topic = header(MessageHeaderKey.CHANNEL), header(MessageHeaderKey.TOPIC)
    if channel == STREAM_CHANNEL and topic not in _TO_JOB[STREAM_CHANNEL]:
        channel, topic = header(StreamHeaderKey.CHANNEL), header(StreamHeaderKey.TOPIC)
    allowed = _TO_SERVER if destination == FQCN.ROOT_SERVER else _TO_JOB
    return channel in allowed and (allowed[channel] is _ANY or topic in allowed[channel])


class SiteGate(FLComponent):
    """At a site: its client has no other commands than those of a job. None of them reads a file or starts a shell."""

    def handle_event(self, event_type: str, fl_ctx: FLContext):
        agent = getattr(fl_ctx.get_engine(), "admin_agent", None)
        if event_type == EventType.SYSTEM_START and agent is not None:
            keep_topics(agent.processors, SITE_TOPICS)


def keep_topics(processors: dict, topics: Iterable[str]):
    """Drop the commands of other topics."""
    for topic in processors.keys() - set(topics):
        del processors[topic]
