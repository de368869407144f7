"""What the processes of `test_nvflare.py` run: sites that obey their payload, and an owner's function that asks them."""

import gc
import json
import os
import resource
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping
from pathlib import Path

from fedbiot_trainer.engines.errors import SiteError


class ObedientSite:
    """Does what it is asked, and says in which process."""

    def __init__(self, name: str):
        self.name = name

    def answer(self, kind: str, payload: bytes) -> bytes:
        words = "" if kind == "echo" else payload.rstrip(b"\0").decode()
        if kind == "echo":
            return payload
        if kind == "raise":
            raise ValueError(f"the private text is {words}")
        if kind == "refuse":
            raise SiteError(f"{words} cannot be done here")
        if kind == "sleep":
            time.sleep(float(words))
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "child":
            return str(subprocess.Popen(["sleep", "600"]).pid).encode()
        if kind == "rank fails":
            return ranks(failing=int(words)).encode()
        if kind == "ranks":
            return ranks().encode()
        if kind == "memory":
            return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss).encode()
        return f"{self.name} {os.getpid()}".encode()


def ranks(failing: int | None = None) -> str:
    """Which of the launched processes this is, and the sum of all ranks, which takes all of them."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    if distributed.get_rank() == failing:
        raise ValueError("the others wait")
    total = torch.tensor(distributed.get_rank())
    distributed.all_reduce(total)
    return f"{distributed.get_rank()} of {distributed.get_world_size()}, together {int(total)}"


class Payloads(Mapping):
    """Each is made when it is taken."""

    def __init__(self, texts: dict[str, str], size: int):
        self.texts = texts
        self.size = size

    def __getitem__(self, site: str) -> bytes:
        return self.texts[site].encode() + bytes(self.size)

    def __iter__(self):
        return iter(self.texts)

    def __len__(self) -> int:
        return len(self.texts)


def owner(carrier, argument: str):
    """
    Ask what the file says, `[[kind, {site: text} or null for all, timeout, zeros after the text], ...]`, and write what
    came of it beside.
    """
    file = Path(argument)
    found = {"results": []}
    write(file.with_suffix(".begun"), found)
    gc.disable()  # so that what is still referred to, also in a cycle, is still there
    try:
        for kind, texts, timeout, size in json.loads(file.read_text()):
            payloads = Payloads(texts or dict.fromkeys(carrier.sites(), ""), size)
            started = time.perf_counter()
            replies = [told(reply, payloads) for reply in carrier.ask(kind, payloads, timeout)]
            seconds = time.perf_counter() - started
            alive = weakref.ref(payloads)
            del payloads
            kept = alive() is not None
            found["results"].append({"replies": replies, "seconds": seconds, "sites": carrier.sites(), "kept": kept})
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    except BaseException as error:  # the end of a run is no `Exception`
        found["aborted"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        write(file.with_suffix(".answer"), found)


def told(reply, payloads: Payloads) -> dict:
    """A reply as JSON."""
    found = {"client": reply.client, "error": reply.error, "seconds": reply.seconds, "payload": None}
    if reply.payload is not None:
        found["payload"] = reply.payload.rstrip(b"\0").decode()
        found["size"] = len(reply.payload)
        found["same"] = reply.payload == payloads[reply.client]
    return found


def write(file: Path, content: dict):
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.rename(file)
