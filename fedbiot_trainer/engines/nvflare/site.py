"""
The process at a site that holds its model, started by the site's NVFlare client and kept for a whole job:

    python -m fedbiot_trainer.engines.nvflare.site package.module:function [argument]

It needs nothing of NVFlare. `accelerate launch -m` starts it as several processes: each gets every request.
"""

import importlib
import os
import queue
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

from ..errors import SiteError


SOCKET = "FEDBIOT_SITE_SOCKET"  # environment variable: the Unix socket at which NVFlare's client listens
READY, ANSWER = "ready", "answer"
ERROR = "error"  # an exception that all processes of the site raise together
FAILURE = "failure"  # one that the others may know nothing of
_HEADER = struct.Struct("!HQ")  # lengths of a frame's kind and of its payload


class Site(Protocol):
    """What the process serves."""

    def answer(self, kind: str, payload: bytes) -> bytes:
        """Do what is asked. An exception becomes an error at the owner, without its text (see [`SiteError`])."""


def send_frame(connection: socket.socket, kind: str, *parts: bytes | memoryview):
    """Send one request or reply, whose payload may come in parts."""
    encoded = kind.encode()
    connection.sendall(_HEADER.pack(len(encoded), sum(map(len, parts))) + encoded)
    for part in parts:
        connection.sendall(part)


def read_frame(stream: BinaryIO) -> tuple[str, bytes]:
    """
    Read one request or reply.

    Raises:
        EOFError: If the other side has gone.
    """
    kind_size, size = _HEADER.unpack(_read(stream, _HEADER.size))
    return _read(stream, kind_size).decode(), _read(stream, size)


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def load(path: str) -> Callable[..., Any]:
    """
    The function that `package.module:function` names.

    Raises:
        ValueError: If it is not written so.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"'{path}' names no function: write 'package.module:function'.")
    return getattr(importlib.import_module(module), name)


def serve(site: Site, rank: int, world_size: int):
    """Answer what NVFlare's client asks, until it has gone: then the process ends, whatever it is doing."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SOCKET])
    requests: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(connection, requests), daemon=True).start()
    send_frame(connection, READY, f"{rank} {world_size}".encode())
    while True:
        kind, payload = requests.get()
        kind, answer = _answer(site, kind, payload)
        send_frame(connection, kind, b"" if rank > 0 and kind == ANSWER else answer)
        del payload, answer


def _read_requests(connection: socket.socket, requests: queue.SimpleQueue):
    stream = connection.makefile("rb")
    try:
        while True:
            requests.put(read_frame(stream))
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # this process and what it has started


def _answer(site: Site, kind: str, payload: bytes) -> tuple[str, bytes]:
    try:
        return ANSWER, site.answer(kind, payload)
    except SiteError as error:
        traceback.print_exc()
        return ERROR, f"{type(error).__name__}: {error}".encode()
    except Exception as error:
        traceback.print_exc()
        return FAILURE, type(error).__name__.encode()


def main(path: str, *argument: str):
    site = load(path)(*argument)
    serve(site, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


if __name__ == "__main__":
    main(*sys.argv[1:])
