"""
Which sites are there. NVFlare notices after ten minutes that a site's machine has gone, and not at all if it connects anew
in the meantime: until then a round would wait for it. So the owner asks each site's process of the job itself.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply


TOPIC = "fedbiot.presence"
LOOK_SECONDS = 5.0  # between two questions
ANSWER_SECONDS = 10.0  # for an answer
START_SECONDS = 120.0  # that a site may take to start its process of the job, beside what follows
# A payload on its way holds up an answer. That there is no connection is known without one; it may be made anew.
UNREACHABLE_SECONDS, SILENT_SECONDS = 30.0, 120.0


def answer(topic: str, request: Shareable, fl_ctx) -> Shareable:
    """What a site says, whatever its own process is doing."""
    return make_reply(ReturnCode.OK)


class Presence:
    """
    Args:
        names (iterable of `str`): The sites of the job.
        ask (`Callable`): Asks sites, for this many seconds. Gives NVFlare's return code for each.
        clock (`Callable`, *optional*): Seconds.
    """

    def __init__(
        self,
        names: Iterable[str],
        ask: Callable[[list[str], float], Mapping[str, str]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ask, self._clock = ask, clock
        self._heard = dict.fromkeys(names, clock() + START_SECONDS)
        self._unreachable: set[str] = set()
        self._started: set[str] = set()  # sites that have been heard of
        self._ended = threading.Event()

    def watch(self):
        """Look until [`end`], in a thread."""
        threading.Thread(target=self._watch, name="presence", daemon=True).start()

    def _watch(self):
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def end(self):
        self._ended.set()

    def look(self):
        """Ask all sites once."""
        for name, code in self._ask(list(self._heard), ANSWER_SECONDS).items():
            if code == ReturnCode.OK:
                self._heard[name] = self._clock()
                self._started.add(name)
            if code in (ReturnCode.OK, ReturnCode.TIMEOUT):
                self._unreachable.discard(name)
            else:
                self._unreachable.add(name)

    def has_started(self, name: str) -> bool:
        """Whether a site's process of the job has been heard of."""
        return name in self._started

    def is_there(self, name: str) -> bool:
        """Whether a site has been heard of lately."""
        most = UNREACHABLE_SECONDS if name in self._unreachable else SILENT_SECONDS
        return self._clock() - self._heard.get(name, -most) < most
