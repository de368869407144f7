"""The owner's side in an NVFlare job: a function asks sites, and NVFlare's tasks carry what it asks."""

import base64
import json
import queue
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from ...federation.interruption import RunInterrupted
from ...federation.pool import Reply
from .parts import split, views
from .presence import TOPIC, Presence
from .site import load


TASK = "fedbiot"
POLL_SECONDS = 0.5  # between two looks whether the job is aborted or a site has gone; a reply is taken as it comes
# An idle site looks for a request several times in a second. One that does not waits for a message that got lost on the way.
FETCH_SECONDS = 30.0
# How long it waits for one, and what is added for each byte that may come.
MESSAGE_SECONDS, SLOWEST_LINE = 30.0, 500_000  # bytes in a second
MAX_ERROR_LENGTH = 500
REVOKED = "it was revoked"


class JobAborted(RunInterrupted):
    """NVFlare ends the job, because someone has aborted it or it has lost a process of its own at a site."""

    def __init__(self):
        super().__init__(signal.SIGTERM)
        self.args = ("NVFlare ends the job.",)


class _Asking:
    """One question to several sites. NVFlare's threads call it; the function's thread takes the replies."""

    def __init__(self, kind: str, payloads: Mapping[str, bytes], timeout: float | None):
        self.kind = kind
        self.payloads = payloads
        self.timeout = timeout
        self.fetched: set[str] = set()
        self._started = time.monotonic()
        self._replies: queue.SimpleQueue[Reply | Exception] = queue.SimpleQueue()

    def task(self, site: str) -> Task:
        """What one site is asked. Its payload is in memory only while it is being sent."""

        def put_in(client_task: ClientTask, fl_ctx: FLContext):
            self.fetched.add(site)
            data = Shareable()
            data["kind"], data["timeout"] = self.kind, self.remaining()
            try:
                data["payload"] = split(self.payloads[site])
            except Exception as error:
                self._replies.put(error)
                raise
            client_task.task.data = data

        def take_out(client_task: ClientTask, fl_ctx: FLContext):
            client_task.task.data = Shareable()

        def receive(client_task: ClientTask, fl_ctx: FLContext):
            result, client_task.result = client_task.result, None
            self._replies.put(self._read(client_task.client.name, result))

        return Task(
            TASK, Shareable(), before_task_sent_cb=put_in, after_task_sent_cb=take_out, result_received_cb=receive
        )

    def next_reply(self, seconds: float) -> Reply | None:
        remaining = self.remaining()
        try:
            reply = self._replies.get(timeout=seconds if remaining is None else min(seconds, remaining))
        except queue.Empty:
            return None
        if isinstance(reply, Exception):
            raise reply
        return reply

    def remaining(self) -> float | None:
        """Seconds that sites still have."""
        return None if self.timeout is None else max(0.0, self._started + self.timeout - time.monotonic())

    def unfetched(self, sites: Iterable[str]) -> list[str]:
        """Those that have had time enough to fetch the request, and have not."""
        late = time.monotonic() - self._started > FETCH_SECONDS
        return [site for site in sites if late and site not in self.fetched]

    def reply(self, site: str, payload: bytes | None = None, error: str | None = None) -> Reply:
        return Reply(site, payload, error, time.monotonic() - self._started)

    def _read(self, site: str, result: Shareable) -> Reply:
        """What a site sends is not trusted."""
        code, error = result.get_return_code(), result.get("error")
        if code != ReturnCode.OK:
            return self.reply(site, error=f"NVFlare: {code}")
        if isinstance(error, str):
            printable = "".join(letter if letter.isprintable() else " " for letter in error[:MAX_ERROR_LENGTH])
            return self.reply(site, error=printable)
        try:
            return self.reply(site, b"".join(views(result.get("answer"))))
        except TypeError:
            return self.reply(site, error="its answer has neither a payload nor an error")


def revoked_sites(server_kit: Path) -> list[str]:
    """Sites that NVFlare lets register no more. It would have them go on with the job that they are in."""
    file = server_kit / "disabled_clients.json"
    return json.loads(file.read_text())["disabled_clients"] if file.is_file() else []


class OwnerController(Controller):
    """
    Runs `function(carrier, argument)` in the server's process of a job, with itself as the carrier.

    Args:
        function (`str`): `package.module:function`, on the owner's machine.
        argument (`str`, *optional*): Handed to it, here in base 64.
    """

    def __init__(self, function: str, argument: str = ""):
        super().__init__()
        self.function = function
        self.argument = base64.b64decode(argument).decode()
        self._abort_signal = Signal()
        self._fl_ctx: Any = None  # NVFlare's context, from when the job begins
        self._presence = Presence([], self._who_is_there)

    def start_controller(self, fl_ctx: FLContext):
        pass

    def stop_controller(self, fl_ctx: FLContext):
        pass

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext):
        self._abort_signal, self._fl_ctx = abort_signal, fl_ctx
        self._presence = Presence(self._participants(), self._who_is_there)
        self._presence.watch()
        try:
            load(self.function)(self, self.argument)
        except RunInterrupted as interruption:  # no error of NVFlare's, whose threads know Exception alone
            self.log_info(fl_ctx, f"The run has ended: {interruption}")
        finally:
            self._presence.end()

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ):
        """An answer that came after its time was up is dropped."""

    def sites(self) -> list[str]:
        """Names, as their certificates say, of the sites that take part in the job, are connected and were not revoked."""
        revoked = self._revoked()
        return [
            name
            for name in self._participants()
            if name not in revoked and self.get_client_disconnect_time(name) is None and self._presence.is_there(name)
        ]

    def is_ending(self) -> bool:
        """Whether NVFlare ends the job. It kills the process some ten seconds later."""
        return self._abort_signal.triggered

    def _revoked(self) -> list[str]:
        return revoked_sites(Path(self._fl_ctx.get_engine().get_workspace().get_root_dir()))

    def _participants(self) -> list[str]:
        return [client.name for client in self._fl_ctx.get_engine().get_clients()]

    def _who_is_there(self, names: list[str], seconds: float) -> dict[str, str]:
        engine = self._fl_ctx.get_engine()
        with engine.new_context() as context:
            replies = engine.send_aux_request(names, TOPIC, Shareable(), seconds, context, optional=True)
        return {name: reply.get_return_code() for name, reply in (replies or {}).items()}

    def expect(self, num_bytes: int):
        """Let sites wait for a message as long as one of `num_bytes` may take."""
        seconds = MESSAGE_SECONDS + num_bytes / SLOWEST_LINE
        self._fl_ctx.set_prop(FLContextKey.MIN_GET_TASK_TIMEOUT, seconds, private=True, sticky=True)

    def ask(self, kind: str, payloads: Mapping[str, bytes], timeout: float | None) -> Iterator[Reply]:
        """
        Ask sites, all at the same time.

        Args:
            kind (`str`): What is asked.
            payloads (`dict[str, bytes]`): For each site. A payload is taken from it when it is sent, in another thread.
            timeout (`float`, *optional*): Seconds that a site has.

        Yields:
            [`Reply`]: One for each site, in the order in which they come. A site that fails, is late or has gone has an
            error in its reply.

        Raises:
            JobAborted: If NVFlare ends the job.
        """
        asking = _Asking(kind, payloads, timeout)
        waiting = {site: asking.task(site) for site in payloads}
        for site, task in waiting.items():
            self.send(task, self._fl_ctx, targets=[site])
        try:
            while waiting:
                if self.is_ending():
                    raise JobAborted
                reply = asking.next_reply(POLL_SECONDS)
                if reply is not None:
                    if waiting.pop(reply.client, None) is not None:
                        revoked = reply.client in self._revoked()
                        yield asking.reply(reply.client, error=REVOKED) if revoked else reply
                    continue
                for site, error in self._given_up(waiting, asking).items():
                    self.cancel_task(waiting.pop(site))
                    yield asking.reply(site, error=error)
        finally:
            asking.payloads = {}  # NVFlare's tasks refer to each other, and to this, until Python collects such cycles
            for task in waiting.values():
                self.cancel_task(task)

    def _given_up(self, waiting: Mapping[str, Task], asking: _Asking) -> dict[str, str]:
        """Sites of which no answer is expected any more, and why."""
        if asking.remaining() == 0:
            return dict.fromkeys(waiting, f"TimeoutError: it took longer than {asking.timeout:g} s")
        connected = self.sites()
        errors = dict.fromkeys(
            filter(self._presence.has_started, asking.unfetched(waiting)),
            "ConnectionError: it does not fetch the request",
        )
        gone = (site for site in waiting if site not in connected)
        errors |= dict.fromkeys(gone, "ConnectionError: it is not connected")
        return errors | {site: REVOKED for site in self._revoked() if site in waiting}
