"""
Machines of a small network, as network namespaces of this one: a bridge in a namespace of its own, and one for each name, with
one cable to it. Nothing of it is in the namespace of this machine, and all of it goes with the context.

Run as a script: `capture FILE` writes what crosses the bridge, in whose namespace it runs; `remove PREFIX` waits for the end of
its input, and removes the namespaces whose names begin so. It does so too if the tests are killed.
"""

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


BRIDGE = "bridge"
_FRAME = struct.Struct("!I")  # length of the frame that follows
_SOL_PACKET, _PACKET_OUTGOING, _PACKET_STATISTICS, _ETH_P_ALL, _SO_RCVBUFFORCE = 263, 4, 6, 3, 33


def why_not() -> str | None:
    """Why this machine makes no namespaces, if it does not."""
    if sys.platform != "linux" or not all(map(shutil.which, ("ip", "nsenter"))):
        return "needs Linux with iproute2 and nsenter"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"fedbiot-{os.getpid()}-try"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
        _run_in(name, [sys.executable, "-c", "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"])
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip() or error}"
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return None


def _ip(*words: str):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _enter(namespace: str, command: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{namespace}", *command]


def _run_in(namespace: str, command: Sequence[str]):
    subprocess.run(_enter(namespace, command), check=True, capture_output=True, text=True)


class Network:
    """
    Made by [`network`].

    Attributes:
        addresses (`dict[str, str]`): Of each machine.
    """

    def __init__(self, prefix: str, names: Sequence[str]):
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self._namespaces = {name: f"{prefix}-{name}" for name in (BRIDGE, *names)}
        self._cables = {name: f"port{number}" for number, name in enumerate(names, 1)}

    def make(self):
        for namespace in self._namespaces.values():
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        switch = self._namespaces[BRIDGE]
        _ip("-n", switch, "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
        _ip("-n", switch, "link", "set", BRIDGE, "up")
        for name, address in self.addresses.items():
            here, cable = self._namespaces[name], self._cables[name]
            _ip("-n", switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", here)
            _ip("-n", switch, "link", "set", cable, "master", BRIDGE, "up")
            _ip("-n", here, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", here, "link", "set", "eth0", "up")

    def start(self, name: str, command: Sequence[object], **kwargs) -> subprocess.Popen:
        """`Popen` on a machine."""
        return subprocess.Popen(_enter(self._namespaces[name], list(map(str, command))), **kwargs)

    def run(self, name: str, command: Sequence[object], **kwargs) -> subprocess.CompletedProcess:
        """`subprocess.run` on a machine."""
        return subprocess.run(_enter(self._namespaces[name], list(map(str, command))), **kwargs)

    def processes(self, name: str) -> dict[int, str]:
        """Command lines of what runs on a machine, by process."""
        return {pid: _read(f"/proc/{pid}/cmdline").replace("\0", " ") for pid in _living(self._namespaces[name])}

    def kill(self, name: str):
        """Pull a machine's plug: all that runs on it gets SIGKILL."""
        _kill(self._namespaces[name])

    def cut(self, name: str):
        """Pull the cable of a machine out of the switch."""
        _ip("-n", self._namespaces[BRIDGE], "link", "set", self._cables[name], "down")

    def mend(self, name: str):
        _ip("-n", self._namespaces[BRIDGE], "link", "set", self._cables[name], "up")

    @contextmanager
    def capture(self, file: Path) -> Iterator[None]:
        """Write every frame that comes to the switch to a file, for [`read_frames`]."""
        process = self.start(BRIDGE, [sys.executable, __file__, "capture", file], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline() == b"listening\n"
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=60)
        assert said == b"0 dropped\n", said


def _kill(namespace: str):
    while living := _living(namespace):  # also what was started meanwhile
        for pid in living:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)


def _living(namespace: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    pids = map(int, listed.stdout.split())
    return [pid for pid in pids if _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])]


def _read(file: str) -> str:
    """Nothing of a process that has ended."""
    try:
        return Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def network(names: Sequence[str]) -> Iterator[Network]:
    """Machines with one cable each, for as long as the context is open."""
    prefix = f"fedbiot-{os.getpid()}"
    remover = subprocess.Popen(
        [sys.executable, __file__, "remove", prefix], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        made = Network(prefix, names)
        made.make()
        yield made
    finally:
        remover.communicate()


def _remove(prefix: str):
    sys.stdin.read()
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for namespace in [line.split()[0] for line in listed.splitlines() if line.startswith(f"{prefix}-")]:
        _kill(namespace)
        subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)


def read_frames(file: Path) -> Iterator[bytes]:
    """Frames of a capture, in the order in which they came."""
    data = memoryview(file.read_bytes())
    while data:
        end = _FRAME.size + _FRAME.unpack(data[: _FRAME.size])[0]
        yield bytes(data[_FRAME.size : end])
        data = data[end:]


def tcp_streams(frames: Iterator[bytes]) -> dict[tuple[str, int, str, int], bytes]:
    """What was sent in each direction of each connection, by the addresses and ports of who sent it and of who got it."""
    parts: dict[tuple[str, int, str, int], dict[int, bytes]] = {}
    first: dict[tuple[str, int, str, int], int] = {}
    for frame in frames:
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            continue
        packet = frame[14 : 14 + int.from_bytes(frame[16:18], "big")]
        segment = packet[4 * (packet[0] & 15) :]
        source, target, sequence = struct.unpack("!HHI", segment[:8])
        key = (socket.inet_ntoa(packet[12:16]), source, socket.inet_ntoa(packet[16:20]), target)
        if segment[13] & 2:  # SYN
            first[key] = sequence + 1
        payload = segment[4 * (segment[12] >> 4) :]
        if payload:
            place = (sequence - first.get(key, sequence)) % 2**32
            known = parts.setdefault(key, {})
            known[place] = max(known.get(place, b""), payload, key=len)
    return {key: _joined(pieces) for key, pieces in parts.items()}


def _joined(pieces: dict[int, bytes]) -> bytes:
    """Segments in their order, what was sent twice once."""
    whole = bytearray()
    for place, piece in sorted(pieces.items()):
        whole[place : place + len(piece)] = piece
    return bytes(whole)


def _capture(file: str):
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 2**28)
    listener.settimeout(0.2)
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    with open(file, "wb") as out:
        while True:
            try:
                frame, (_, _, kind, *_) = listener.recvfrom(2**17)
            except TimeoutError:
                if ended:
                    break
                continue
            if kind != _PACKET_OUTGOING:  # it was seen when it came in
                out.write(_FRAME.pack(len(frame)) + frame)
    _, dropped = struct.unpack("II", listener.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    sys.stdout.write(f"{dropped} dropped\n")


if __name__ == "__main__":
    {"capture": _capture, "remove": _remove}[sys.argv[1]](sys.argv[2])
