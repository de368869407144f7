"""NVFlare's side of a site: hands each task to the site's process, and its answer back."""

import json
import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReservedTopic, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from ..errors import SiteError
from . import presence
from .parts import split, views
from .process import SiteProcess, Stopped
from .site import ANSWER


SITE_FILE = "fedbiot_site.json"  # in the `local` folder of the site's startup kit
CHECK_SECONDS = 5.0  # for the owner's job to say that it is there
RETRY_SECONDS = 1.0  # before it is asked again


class SiteExecutor(Executor):
    """
    Runs at a site, in NVFlare's process of a job. What it starts is the site's own decision: the command stands in
    `local/fedbiot_site.json` of its startup kit, and no job of the owner can name another.

    Nothing that fails here may leave it as an exception, as NVFlare would then abort the job for all sites.
    """

    def __init__(self):
        super().__init__()
        self._process: SiteProcess | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext):
        if event_type == EventType.START_RUN:
            fl_ctx.get_engine().register_aux_message_handler(presence.TOPIC, presence.answer)
        if event_type == EventType.END_RUN and self._process is not None:
            self._process.end()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        reply = make_reply(ReturnCode.OK)
        try:
            kind, payload = self._answer(shareable, fl_ctx, abort_signal)
            reply[kind] = split(payload) if kind == ANSWER else payload.decode()
        except SiteError as error:
            reply["error"] = f"SiteError: {error}"
        except Stopped:
            reply["error"] = "TimeoutError"
        except Exception as error:
            self.log_exception(fl_ctx, "The request could not be handed to the site's process.")
            reply["error"] = type(error).__name__
        await_owner(fl_ctx, abort_signal)
        return reply

    def _answer(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> tuple[str, bytes]:
        if self._process is None:
            workspace = fl_ctx.get_engine().get_workspace()
            log = Path(workspace.get_run_dir(fl_ctx.get_job_id()), "site.log")
            self._process = SiteProcess(read_command(Path(workspace.get_site_config_dir())), log)
        timeout = shareable["timeout"]
        deadline = None if timeout is None else time.monotonic() + timeout

        def stopped() -> bool:
            return abort_signal.triggered or (deadline is not None and time.monotonic() > deadline)

        return self._process.ask(shareable["kind"], views(shareable.pop("payload")), stopped)


def await_owner(fl_ctx: FLContext, abort_signal: Signal):
    """
    Return when the owner's job can be reached, or nobody waits for the answer any more. NVFlare asks the same once before it
    sends an answer. But if that takes too long it sends all the same, and an answer that a lost connection took with it
    holds the site up for as long as its largest message may take.
    """
    request = Shareable()
    request.set_header(ReservedKey.TASK_ID, fl_ctx.get_prop(FLContextKey.TASK_ID))
    while not abort_signal.triggered:
        replies = fl_ctx.get_engine().send_aux_request(
            [FQCN.ROOT_SERVER], ReservedTopic.TASK_CHECK, request, CHECK_SECONDS, fl_ctx, optional=True
        )
        reply = (replies or {}).get(FQCN.ROOT_SERVER)
        if reply is None or reply.get_return_code() not in (ReturnCode.TIMEOUT, ReturnCode.COMMUNICATION_ERROR):
            return
        time.sleep(RETRY_SECONDS)


def read_command(folder: Path) -> list[str]:
    """
    What starts the site's process.

    Raises:
        SiteError: If the site does not say, or says it wrongly.
    """
    try:
        settings: Any = json.loads((folder / SITE_FILE).read_text())
    except FileNotFoundError as error:
        raise SiteError(f"The site has no `{SITE_FILE}` in the `local` folder of its startup kit.") from error
    except ValueError as error:
        raise SiteError(f"The site's `{SITE_FILE}` is no JSON.") from error
    command = settings.get("command") if isinstance(settings, dict) else None
    if not isinstance(command, list) or not command or not all(isinstance(part, str) for part in command):
        raise SiteError(f"The site's `{SITE_FILE}` has no `command`, which is a list of strings.")
    return command
