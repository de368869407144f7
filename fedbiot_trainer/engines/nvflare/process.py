"""The other end of the site's process: it starts, asks, and ends it. It needs nothing of NVFlare."""

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from ..errors import SiteError
from .site import ERROR, FAILURE, READY, SOCKET, read_frame, send_frame


POLL_SECONDS = 0.2  # between two looks whether to stop; an answer is taken as soon as it comes


class Stopped(Exception):
    """There was no answer before the request was given up."""


class SiteProcess:
    """
    The process (or, behind a launcher, the processes) of a site. It starts with the first request, and again with the
    next one after it has died.

    Args:
        command (sequence of `str`): What starts it.
        log (`Path`): Where its output goes. It may hold private text, and stays at the site.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self.command = list(command)
        self.log = log
        self._process: subprocess.Popen | None = None
        self._ranks: dict[int, tuple[socket.socket, BinaryIO]] = {}
        self._unread: set[int] = set()  # ranks whose reply to the last request has not been read

    def ask(self, kind: str, parts: Sequence[bytes | memoryview], stopped: Callable[[], bool]) -> tuple[str, bytes]:
        """
        Have a request answered.

        Args:
            kind (`str`): What is asked.
            parts (sequence of `bytes` or `memoryview`): Its payload, in parts.
            stopped (`Callable`): Whether the request is given up.

        Returns:
            `str`, `bytes`: `"answer"` and what the site answers, or `"error"` and what the owner may know of it.

        Raises:
            Stopped: If it was given up.
            SiteError: If the process died or cannot start.
        """
        try:
            self._drop_old_replies()
            if self._process is not None and self._process.poll() is not None:  # it died since the last request
                self._bury("nothing")
            if self._process is None:
                self._start(stopped)
            self._unread = set(self._ranks)
            for connection, _ in self._ranks.values():
                send_frame(connection, kind, *parts)
            return self._reply(stopped)
        except (EOFError, OSError) as error:
            self._bury(kind)
            raise SiteError(
                "The site's process died. It starts anew with the next request. Its log says more."
            ) from error

    def _reply(self, stopped: Callable[[], bool]) -> tuple[str, bytes]:
        replies: dict[int, tuple[str, bytes]] = {}
        while self._unread:
            replies |= self._read(POLL_SECONDS)
            failure = next((payload for kind, payload in replies.values() if kind == FAILURE), None)
            if failure is not None:
                if len(self._ranks) > 1:
                    # The others may wait for that one in the middle of a step, and cannot be called back.
                    self.end()
                return ERROR, failure
            if self._unread and stopped():
                raise Stopped
        return replies[0]

    def _bury(self, kind: str):
        """End what is left of a process that has died, and say so in the log, unless the disk is full."""
        code = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(1)
        self.end()
        with suppress(OSError), open(self.log, "a") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} died when asked for {kind}, exit code {code}\n")

    def end(self):
        """Kill the process and what it has started."""
        for connection, stream in self._ranks.values():
            stream.close()
            connection.close()  # ranks that a launcher has put into sessions of their own end by this
        self._ranks, self._unread = {}, set()
        if self._process is not None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()
            self._process = None

    def _drop_old_replies(self):
        """A request that was given up has been answered in the meantime, or the process is still at it and is ended."""
        while self._unread and self._read(0):
            pass
        if self._unread:
            self.end()

    def _start(self, stopped: Callable[[], bool]):
        folder = tempfile.mkdtemp(prefix="fedbiot-")  # nobody else may enter it, and so connect
        listener = socket.socket(socket.AF_UNIX)
        try:
            address = os.path.join(folder, "socket")
            listener.bind(address)
            listener.listen()
            listener.settimeout(POLL_SECONDS)
            with open(self.log, "ab") as log:
                self._process = subprocess.Popen(
                    self.command,
                    env=os.environ | {SOCKET: address},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            world_size = 1
            while len(self._ranks) < world_size:
                world_size = self._accept(listener, world_size)
                if self._process.poll() is not None:
                    raise EOFError
                if len(self._ranks) < world_size and stopped():
                    self.end()
                    raise Stopped
        finally:
            listener.close()
            shutil.rmtree(folder)

    def _accept(self, listener: socket.socket, world_size: int) -> int:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return world_size
        connection.setblocking(True)
        stream = connection.makefile("rb")
        kind, numbers = read_frame(stream)
        if kind != READY:
            raise EOFError
        rank, world_size = map(int, numbers.split())
        self._ranks[rank] = connection, stream
        return world_size

    def _read(self, seconds: float) -> dict[int, tuple[str, bytes]]:
        """The replies that came within some seconds, by rank."""
        waiting = {self._ranks[rank][0]: rank for rank in self._unread}
        readable, _, _ = select.select(list(waiting), [], [], seconds)
        replies = {}
        for connection in readable:
            rank = waiting[connection]
            replies[rank] = read_frame(self._ranks[rank][1])
            self._unread.discard(rank)
        return replies
