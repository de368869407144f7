"""The owner's side of a run whose clients are elsewhere: a pool for the round loop, on any engine that carries bytes."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from ..federation.pool import Reply
from ..wire.frame import shown
from ..wire.shipment import PIECE, PackageList, Piece


POLL = 0.5  # seconds
DELIVERY_TIMEOUT = 600.0  # seconds that a site has for one piece of the package


class Carrier(Protocol):
    """An engine, as the owner sees it."""

    def sites(self) -> list[str]:
        """The sites that are connected now, by the names that the engine has verified."""

    def is_ending(self) -> bool:
        """Whether the engine ends the run."""

    def expect(self, num_bytes: int):
        """Be told how large a payload can be, before it comes. A message that takes longer than that needs is lost."""

    def ask(self, kind: str, payloads: Mapping[str, bytes], timeout: float | None) -> Iterator[Reply]:
        """
        Bring each site its payload, and what [`Site.answer`] makes of it back.

        Args:
            kind (`str`): The request.
            payloads (`dict[str, bytes]`): For each site; read when it is sent.
            timeout (`float`, *optional*): Seconds that a site has.

        Yields:
            [`Reply`]: One for each site, as they come. One that fails, leaves or is late has an error in its reply.
        """


class RemoteClients:
    """
    A [`ClientPool`] of sites. Before a site trains it is given the emulator package, of which it keeps what it has.

    Args:
        carrier ([`Carrier`]): Brings payloads to the sites.
        package (`str` or `Path`): The folder of the emulator package.
        min_sites (`int`, *optional*): Sites that a round waits for.
        patience (`float`, *optional*): Seconds that it waits; then it begins with those that are there, and so do the following
            ones until as many have been there again.
        piece (`int`, *optional*): Bytes of the package in one payload.
    """

    def __init__(
        self,
        carrier: Carrier,
        package: str | Path,
        min_sites: int = 1,
        patience: float = 600.0,
        piece: int = PIECE,
    ):
        self.carrier, self.package, self.piece = carrier, Path(package), piece
        self.min_sites, self.patience = min_sites, patience
        self.bytes_delivered = 0
        self.on_client: Callable[[str], None] = lambda name: None  # told who has answered
        self.on_wait: Callable[[str], None] = lambda line: None  # told of a wait for sites
        self._digests: dict[tuple[str, int, int], str] = {}
        self._ready: set[str] = set()
        self._waited = False  # in vain, for a site that has left
        self._known: set[str] = set()  # sites that have been ready

    def names(self) -> list[str]:
        if not self._digests:  # what no site would take is said before the alignment
            PackageList.of(self.package, self._digests)
        began = time.monotonic()
        patience, told = 0.0 if self._waited else self.patience, False
        while len(sites := self.carrier.sites()) < self.min_sites and time.monotonic() < began + patience:
            if not told:
                self.on_wait(f"waiting for {self.min_sites} sites, {patience:g} s at most; there: {_listed(sites)}")
                told = True
            time.sleep(POLL)
        self._waited = len(sites) < self.min_sites
        if self._waited:
            self.on_wait(f"going on with {len(sites)} of {self.min_sites} sites: {_listed(sites)}")
        elif told:
            self.on_wait(f"all {self.min_sites} sites are there after {time.monotonic() - began:.0f} s")
        return sorted(sites)

    def fit(self, starts: Mapping[str, bytes], timeout: float | None) -> Iterator[Reply]:
        errors = self._deliver([name for name in starts if name not in self._ready], timeout)
        for name, error in errors.items():
            yield Reply(name, error=f"the package could not be delivered: {error}")
        for reply in self.carrier.ask("fit", _Part(starts, set(starts) - errors.keys()), timeout):
            if reply.error is not None:
                self._ready.discard(reply.client)  # it may have been started anew
            self.on_client(reply.client)
            yield reply

    def _deliver(self, names: list[str], timeout: float | None) -> dict[str, str]:
        """
        Give sites what they lack of the package, all at the same time. Those that have had it hold up a round no longer than
        in training. Returns what failed.
        """
        errors: dict[str, str] = {}
        if not names:
            return errors
        seconds = DELIVERY_TIMEOUT
        if timeout is not None and self._known.issuperset(names):
            seconds = min(timeout, DELIVERY_TIMEOUT)
        # Its LoRAs are written anew after each round, so that it is another for sites that come later.
        package, pieces = PackageList.of(self.package, self._digests), {}
        self.carrier.expect(max(self.piece, package.num_bytes_of_loras))
        for reply in self.carrier.ask("hello", dict.fromkeys(names, package.to_bytes()), seconds):
            try:
                pieces[reply.client] = package.pieces(read_had(reply, package), self.piece)
            except ValueError as error:
                errors[reply.client] = str(error)
        while pieces:
            places = {name: piece for name, left in pieces.items() if (piece := next(left, None)) is not None}
            pieces = {name: left for name, left in pieces.items() if name in places}
            failed = self._bring(places, seconds)
            errors |= failed
            pieces = {name: left for name, left in pieces.items() if name not in failed}
        self._ready |= set(names) - errors.keys()
        self._known |= self._ready
        return errors

    def _bring(self, places: Mapping[str, Piece], seconds: float) -> dict[str, str]:
        """One piece to each site. Sites that are at the same place share it in memory. Returns what failed."""
        read = {piece: piece.read(self.package) for piece in set(places.values())}
        payloads = {name: read[piece] for name, piece in places.items()}
        errors = {}
        for reply in self.carrier.ask("package", payloads, seconds):
            self.bytes_delivered += len(payloads[reply.client])
            if reply.error is not None:
                errors[reply.client] = reply.error
        return errors


def _listed(sites: list[str]) -> str:
    return ", ".join(sorted(sites)) or "none"


class _Part(Mapping[str, bytes]):
    """Some of the payloads, each still made when it is asked for."""

    def __init__(self, payloads: Mapping[str, bytes], names: set[str]):
        self.payloads, self.chosen = payloads, [name for name in payloads if name in names]

    def __getitem__(self, name: str) -> bytes:
        return self.payloads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)


def read_had(reply: Reply, package: PackageList) -> dict[str, int]:
    """
    What a site says that it has of each file.

    Raises:
        ValueError: If it does not say it, or it cannot be.
    """
    if reply.payload is None:
        raise ValueError(reply.error or "it did not answer")
    sizes = {file.name: file.size for file in package.files}
    try:
        had = json.loads(reply.payload[: 2**17])
    except (ValueError, RecursionError):
        had = None
    if not isinstance(had, dict) or not all(
        type(size) is int and 0 <= size <= sizes.get(name, -1) for name, size in had.items()
    ):
        raise ValueError(f"it says that it has {shown(had)} of the package")
    return had
