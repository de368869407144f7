"""
The wire format: what crosses the line between server and clients, as bytes that are checked before use.

A payload is `magic (8 bytes) | SHA-256 of the rest (32) | manifest length (8, little endian) | manifest (JSON) |
tensors (safetensors)`. There is no pickle in it. The digest guards against damage, not against forgery: authenticate
the channel.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .lora import LoraState


MAGIC = b"FEDBIOT\x00"
SCHEMA_VERSION = 1
MAX_EXAMPLES = 10**12


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
        raise PayloadError(f"the {name} has missing or unknown tensors: {', '.join(odd[:3])} ({len(odd)} in all)")
    for key, tensor in received.items():
        shape, dtype = expected[key].shape, expected[key].dtype
        if tensor.shape != shape or tensor.dtype != dtype:
            raise PayloadError(
                f"`{key}` of the {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {tuple(shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise PayloadError(f"`{key}` of the {name} has values that are not finite")


@dataclass
class _Payload:
    """A manifest of plain values and groups of tensors. Subclasses say which."""

    kind: ClassVar[str]
    manifest_fields: ClassVar[dict[str, type]]
    tensor_fields: ClassVar[tuple[str, ...]]

    def to_bytes(self) -> bytes:
        """Encode the payload."""
        manifest = {"schema_version": SCHEMA_VERSION, "kind": self.kind}
        manifest |= {name: getattr(self, name) for name in self.manifest_fields}
        head = json.dumps(manifest, sort_keys=True).encode()
        tensors = {
            f"{group}/{key}": tensor.contiguous()
            for group in self.tensor_fields
            for key, tensor in getattr(self, group).items()
        }
        rest = len(head).to_bytes(8, "little") + head + save(tensors)
        return MAGIC + hashlib.sha256(rest).digest() + rest

    @classmethod
    def from_bytes(cls, data: bytes, server_round: int):
        """
        Decode and check a payload.

        Args:
            data (`bytes`): What [`to_bytes`] made.
            server_round (`int`): The round that the receiver is in.

        Raises:
            PayloadError: If it is damaged, of another kind or schema, or from another round.
        """
        manifest, tensors = _decode(data)
        if manifest.get("kind") != cls.kind or manifest.get("schema_version") != SCHEMA_VERSION:
            raise PayloadError(
                f"expected {cls.kind} of schema {SCHEMA_VERSION}, got {manifest.get('kind')} of schema "
                f"{manifest.get('schema_version')}"
            )
        groups: dict[str, LoraState] = {name: {} for name in cls.tensor_fields}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            if group not in groups:
                raise PayloadError(f"unknown tensor `{name}`")
            groups[group][key] = tensor
        values = {name: manifest.get(name) for name in cls.manifest_fields}
        payload = cls(**values, **groups)
        payload.check(server_round)
        return payload

    def check(self, server_round: int):
        """
        Check what stands in the manifest.

        Raises:
            PayloadError: If a value has the wrong type, or the payload is from another round.
        """
        for name, expected in self.manifest_fields.items():
            value = getattr(self, name)
            if not isinstance(value, expected) or isinstance(value, bool):
                raise PayloadError(f"`{name}` is {value!r}, expected a value of type {expected.__name__}")
        if self.server_round != server_round:
            raise PayloadError(f"it is from round {self.server_round}, but this is round {server_round}")


def _decode(data: bytes) -> tuple[dict[str, Any], LoraState]:
    start = len(MAGIC) + 32
    if len(data) < start + 8 or data[: len(MAGIC)] != MAGIC:
        raise PayloadError("it is not a FedBiOT payload, or it is truncated")
    rest = memoryview(data)[start:]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : start]:
        raise PayloadError("its digest does not match its content: it is truncated or altered")
    end = 8 + int.from_bytes(rest[:8], "little")
    try:
        manifest, tensors = json.loads(bytes(rest[8:end])), load(bytes(rest[end:]))
    except (ValueError, SafetensorError) as error:
        raise PayloadError(f"it cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise PayloadError("its manifest is not an object")
    return manifest, tensors


@dataclass
class RoundStart(_Payload):
    """
    Server to client, at the start of a round.

    Attributes:
        server_round (`int`): The round, counted from 1.
        client_lora (`dict[str, torch.Tensor]`): The averaged client LoRA.
        emulator_lora (`dict[str, torch.Tensor]`): The emulator LoRA after this round's alignment.
    """

    server_round: int
    client_lora: LoraState = field(repr=False)
    emulator_lora: LoraState = field(repr=False)

    kind = "round_start"
    manifest_fields = {"server_round": int}
    tensor_fields = ("client_lora", "emulator_lora")


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

    kind = "client_update"
    manifest_fields = {"server_round": int, "client": str, "num_examples": int, "metrics": dict}
    tensor_fields = ("client_lora",)

    def check(self, server_round: int):
        super().check(server_round)
        if not 1 <= self.num_examples <= MAX_EXAMPLES:
            raise PayloadError(f"`num_examples` is {self.num_examples}, expected 1 to {MAX_EXAMPLES:,}")
        if "loss" not in self.metrics:
            raise PayloadError("metric `loss` is missing")
        for name, value in self.metrics.items():
            if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
                raise PayloadError(f"metric `{name}` is {value!r}, expected a finite number")
