"""
The wire format: what crosses the line between server and clients, as bytes that are checked before use.

A payload is `magic (8 bytes) | SHA-256 of the rest (32) | manifest length (8, little endian) | manifest (JSON) |
tensors (safetensors)`. There is no pickle in it. The digest guards against damage, not against forgery: authenticate
the channel.

A receiver knows the tensors that must come, and with them how large a payload can be: more is refused unread.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..shared.lora_state import LoraState


MAGIC = b"FEDBIOT\x00"
SCHEMA_VERSION = 2
DIGEST_END = len(MAGIC) + 32
MAX_MANIFEST = 2**16  # bytes
MAX_EXAMPLES = 10**12
MAX_NUMBER = 2**53  # what JSON carries exactly
MAX_METRICS = 64
MAX_NAME = 256  # characters


class PayloadError(ValueError):
    """A payload that must not be used: damaged, from another round, of another shape, or not finite."""


def check_lora(name: str, received: LoraState, expected: LoraState):
    """
    Check a received LoRA against one of the same model.

    Raises:
        PayloadError: If tensors are missing or unknown, or one has another shape or dtype, or is not finite.
    """
    if received.keys() != expected.keys():
        odd = sorted(received.keys() ^ expected.keys())
        shown = ", ".join(f"{key:.100}" for key in odd[:3])
        raise PayloadError(f"The {name} has missing or unknown tensors: {shown} ({len(odd)} in all).")
    for key, tensor in received.items():
        shape, dtype = expected[key].shape, expected[key].dtype
        if tensor.shape != shape or tensor.dtype != dtype:
            raise PayloadError(
                f"`{key}` of the {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise PayloadError(f"`{key}` of the {name} has values that are not finite.")


@dataclass(frozen=True)
class LocalWork:
    """
    All that a client must know of a round besides the LoRAs. Clients keep nothing between rounds.

    Attributes:
        local_steps (`int`): Optimizer steps to take.
        first_step (`int`): Steps that this client has taken in earlier rounds: where in its data it goes on.
        schedule_step (`int`): Where in the learning-rate schedule the round starts, in steps.
        schedule_length (`int`): Steps over which that schedule runs.
        proximal_weight (`float`): Weight of the proximal term.
        seed (`int`): Seed of dropout in these steps.
    """

    local_steps: int
    first_step: int
    schedule_step: int
    schedule_length: int
    proximal_weight: float
    seed: int

    @classmethod
    def parse(cls, value: Any) -> "LocalWork":
        """
        Read it from a manifest.

        Raises:
            PayloadError: If a value is missing or unknown, or cannot be.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or sorted(value) != sorted(names):
            raise PayloadError(f"The work order must have exactly {', '.join(names)}, got {_shown(value)}.")
        for name, number in value.items():
            kinds, least = (int, float) if name == "proximal_weight" else (int,), int(name == "local_steps")
            if type(number) not in kinds or not least <= number <= MAX_NUMBER:
                raise PayloadError(
                    f"`{name}` of the work order is {_shown(number)}, expected a number from {least} to {MAX_NUMBER:,}."
                )
        return cls(**value)


def _shown(value: Any) -> str:
    """A received value for an error, which must not grow with it."""
    try:
        return f"{value!r:.100}"
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


@dataclass
class _Payload:
    """A manifest of plain values and groups of tensors. Subclasses say which."""

    title: ClassVar[str]
    kind: ClassVar[str]
    manifest_fields: ClassVar[dict[str, type]]
    tensor_fields: ClassVar[tuple[str, ...]]

    def to_bytes(self) -> bytes:
        """Encode the payload."""
        return _frame(_encode_manifest(self._manifest()), save(self._tensors()))

    def _manifest(self) -> dict[str, Any]:
        manifest = {name: getattr(self, name) for name in self.manifest_fields}
        return {"schema_version": SCHEMA_VERSION, "kind": self.kind, **manifest}

    def _tensors(self) -> LoraState:
        return {
            f"{group}/{key}": tensor.contiguous()
            for group in self.tensor_fields
            for key, tensor in getattr(self, group).items()
        }

    @classmethod
    def from_bytes(cls, data: bytes, server_round: int | None = None, **expected: LoraState) -> Self:
        """
        Decode and check a payload.

        Args:
            data (`bytes`): What [`to_bytes`] made.
            server_round (`int`, *optional*): The round that the receiver is in, if it knows.
            **expected (`dict[str, torch.Tensor]`): For each group of tensors, one of the same model.

        Raises:
            PayloadError: If it is too large, damaged, of another kind or schema, from another round, for another model,
                or not finite.
        """
        expected = {name: expected[name] for name in cls.tensor_fields}
        limit = _max_bytes(expected)
        if len(data) > limit:
            raise PayloadError(
                f"The {cls.title} has {len(data):,} bytes, but for this model it can have {limit:,} at most."
            )
        manifest, tensors = _decode(cls.title, data)
        if manifest.get("kind") != cls.kind or manifest.get("schema_version") != SCHEMA_VERSION:
            raise PayloadError(
                f"The payload is {_shown(manifest.get('kind'))} of schema {_shown(manifest.get('schema_version'))}, "
                f"expected {cls.kind} of schema {SCHEMA_VERSION}."
            )
        unknown = manifest.keys() - {"kind", "schema_version", *cls.manifest_fields}
        if unknown:
            raise PayloadError(f"The {cls.title} has unknown values: {_shown(sorted(unknown))}.")
        groups: dict[str, LoraState] = {name: {} for name in cls.tensor_fields}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            if group not in groups:
                raise PayloadError(f"The {cls.title} has an unknown tensor `{name:.100}`.")
            groups[group][key] = tensor
        payload = cls(**{name: manifest.get(name) for name in cls.manifest_fields}, **groups)
        payload.check(server_round)
        for name, state in groups.items():
            check_lora(name.replace("_lora", " LoRA"), state, expected[name])
        return payload

    def check(self, server_round: int | None):
        """
        Check what stands in the manifest.

        Raises:
            PayloadError: If a value has the wrong type, or the payload is from another round.
        """
        for name, expected in self.manifest_fields.items():
            value = getattr(self, name)
            if type(value) is not expected:
                raise PayloadError(
                    f"`{name}` of the {self.title} is {_shown(value)}, expected a value of type {expected.__name__}."
                )
        if not 0 <= self.server_round <= MAX_NUMBER:
            raise PayloadError(
                f"`server_round` of the {self.title} is {_shown(self.server_round)}, which is no round."
            )
        if server_round is not None and self.server_round != server_round:
            raise PayloadError(
                f"The {self.title} is from round {self.server_round}, but this is round {server_round}."
            )


def _encode_manifest(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _frame(head: bytes, tensors: bytes) -> bytes:
    rest = len(head).to_bytes(8, "little") + head + tensors
    return MAGIC + hashlib.sha256(rest).digest() + rest


def _max_bytes(expected: Mapping[str, LoraState]) -> int:
    """Most that a payload with these tensors can have: safetensors describes each by its name and some numbers."""
    states = [(f"{group}/{key}", tensor) for group, state in expected.items() for key, tensor in state.items()]
    header = sum(len(json.dumps(name)) + 200 for name, _ in states)
    return DIGEST_END + 8 + MAX_MANIFEST + 1024 + header + sum(tensor.nbytes for _, tensor in states)


def _decode(title: str, data: bytes) -> tuple[dict[str, Any], LoraState]:
    if len(data) < DIGEST_END + 8 or data[: len(MAGIC)] != MAGIC:
        raise PayloadError(f"The {title} is not a FedBiOT payload, or it is truncated.")
    rest = memoryview(data)[DIGEST_END:]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : DIGEST_END]:
        raise PayloadError(f"The digest of the {title} does not match its content: it is truncated or altered.")
    length = int.from_bytes(rest[:8], "little")
    if length > MAX_MANIFEST:
        raise PayloadError(f"The manifest of the {title} has {length:,} bytes, but {MAX_MANIFEST:,} are the most.")
    end = 8 + length
    try:
        manifest = json.loads(
            bytes(rest[8:end]), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        tensors = load(bytes(rest[end:]))
    # RecursionError: an object nested thousands deep. OverflowError: a shape beyond any memory.
    except (ValueError, SafetensorError, RecursionError, OverflowError) as error:
        raise PayloadError(f"The {title} cannot be read: {_shown(str(error))}.") from None
    if not isinstance(manifest, dict):
        raise PayloadError(f"The manifest of the {title} is not an object.")
    return manifest, tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a value stands twice in its manifest")
    return values


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a number")


@dataclass
class RoundStart(_Payload):
    """
    Server to client, at the start of a round.

    Attributes:
        server_round (`int`): The round, counted from 1.
        work ([`LocalWork`]): What this client is to do.
        client_lora (`dict[str, torch.Tensor]`): The averaged client LoRA.
        emulator_lora (`dict[str, torch.Tensor]`): The emulator LoRA after this round's alignment.
    """

    server_round: int
    work: LocalWork
    client_lora: LoraState = field(repr=False)
    emulator_lora: LoraState = field(repr=False)

    title = "round start"
    kind = "round_start"
    manifest_fields = {"server_round": int, "work": LocalWork}
    tensor_fields = ("client_lora", "emulator_lora")

    def _manifest(self):
        return super()._manifest() | {"work": asdict(self.work)}

    def check(self, server_round):
        if not isinstance(self.work, LocalWork):
            self.work = LocalWork.parse(self.work)
        super().check(server_round)


class RoundStarts(Mapping[str, bytes]):
    """
    The payloads of one round for its clients, each encoded when it is asked for: their tensors are the same.

    Args:
        server_round (`int`): The round, counted from 1.
        works (`dict[str, LocalWork]`): What each client is to do, by name.
        client_lora, emulator_lora (`dict[str, torch.Tensor]`): The LoRAs.
        other_loras (`dict[str, dict]`, *optional*): Client LoRAs of clients that get another one, by name.
    """

    def __init__(
        self,
        server_round: int,
        works: Mapping[str, LocalWork],
        client_lora: LoraState,
        emulator_lora: LoraState,
        other_loras: Mapping[str, LoraState] | None = None,
    ):
        self.works = dict(works)
        others = other_loras or {}
        self._of = lambda name: RoundStart(
            server_round, self.works[name], others.get(name, client_lora), emulator_lora
        )
        self._tensors = save(RoundStart(server_round, None, client_lora, emulator_lora)._tensors())
        self._other_tensors = {name: save(self._of(name)._tensors()) for name in others if name in self.works}

    def size(self, name: str) -> int:
        """Bytes of the payload for a client."""
        return DIGEST_END + 8 + len(self._head(name)) + len(self._other_tensors.get(name, self._tensors))

    def _head(self, name: str) -> bytes:
        return _encode_manifest(self._of(name)._manifest())

    def __getitem__(self, name: str) -> bytes:
        return _frame(self._head(name), self._other_tensors.get(name, self._tensors))

    def __iter__(self) -> Iterator[str]:
        return iter(self.works)

    def __len__(self) -> int:
        return len(self.works)


@dataclass
class ClientUpdate(_Payload):
    """
    Client to server, at the end of a round. It holds nothing else of the client's.

    Attributes:
        server_round (`int`): The round, counted from 1.
        client (`str`): Name of the client.
        num_examples (`int`): Training examples that the client holds: its weight in the average.
        metrics (`dict[str, float]`): Numbers to report, `loss` among them.
        client_lora (`dict[str, torch.Tensor]`): The client LoRA after the local steps.
    """

    server_round: int
    client: str
    num_examples: int
    metrics: dict[str, float]
    client_lora: LoraState = field(repr=False)

    title = "client update"
    kind = "client_update"
    manifest_fields = {"server_round": int, "client": str, "num_examples": int, "metrics": dict}
    tensor_fields = ("client_lora",)

    def check(self, server_round):
        super().check(server_round)
        if len(self.client) > MAX_NAME:
            raise PayloadError(f"`client` of the client update has {len(self.client)} characters, {MAX_NAME} at most.")
        if not 1 <= self.num_examples <= MAX_EXAMPLES:
            raise PayloadError(
                f"`num_examples` of the client update is {_shown(self.num_examples)}, expected 1 to {MAX_EXAMPLES:,}."
            )
        if "loss" not in self.metrics:
            raise PayloadError("Metric `loss` of the client update is missing.")
        if len(self.metrics) > MAX_METRICS:
            raise PayloadError(f"The client update has {len(self.metrics)} metrics, {MAX_METRICS} at most.")
        for name, value in self.metrics.items():
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                raise PayloadError(
                    f"Metric `{name:.{MAX_NAME}}` of the client update is {_shown(value)}, expected a finite number."
                )
