"""
The wire format: what crosses the line between server and clients, as bytes that are checked before use.

A payload is `magic (8 bytes) | SHA-256 of the rest (32) | manifest length (8, little endian) | manifest (JSON) |
tensors (safetensors)`. There is no pickle in it. The digest guards against damage, not against forgery: authenticate
the channel.

A receiver knows the tensors that must come, and with them how large a payload and each part of it can be: more is
refused unread. Nothing may stand in a payload that its reader would not see.
"""

import hashlib
import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..shared.lora_state import LoraState


MAGIC = b"FEDBIOT\x00"
DIGEST_END = len(MAGIC) + 32
MAX_MANIFEST = 2**16  # bytes


class PayloadError(ValueError):
    """A payload that must not be used: damaged, from another round, of another shape, or not finite."""


def shown(value: Any) -> str:
    """A received value for an error, which must not grow with it nor hold what a terminal would obey."""
    try:
        return f"{value!r:.100}"
    # Python prints neither integers of thousands of digits nor what is nested as deeply.
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} that is too long to show"


def encode(manifest: dict[str, Any], tensors: bytes) -> bytes:
    """A payload of plain values and of what safetensors made of tensors."""
    head = _encode_manifest(manifest)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256(head)
    digest.update(tensors)
    return b"".join((MAGIC, digest.digest(), head, tensors))


def frame_size(manifest: dict[str, Any], tensors: bytes) -> int:
    """Bytes of what [`encode`] makes of them."""
    return DIGEST_END + 8 + len(_encode_manifest(manifest)) + len(tensors)


def _encode_manifest(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def max_bytes(expected: LoraState) -> int:
    """Most bytes that a payload with these tensors can have."""
    tensors = 8 + _max_header(expected) + sum(tensor.nbytes for tensor in expected.values())
    return DIGEST_END + 8 + MAX_MANIFEST + tensors


def _max_header(expected: LoraState) -> int:
    """Most bytes in which safetensors can describe these tensors: each by its name and some numbers."""
    return 1024 + sum(len(json.dumps(name)) + 200 for name in expected)


def unpack(title: str, data: bytes) -> tuple[dict[str, Any], memoryview]:
    """
    The manifest of a payload that is whole, and the bytes of its tensors.

    Raises:
        PayloadError: If it is damaged, or its manifest cannot be read.
    """
    if len(data) < DIGEST_END + 8 or data[: len(MAGIC)] != MAGIC:
        raise PayloadError(f"The {title} is not a FedBiOT payload, or it is truncated.")
    rest = memoryview(data)[DIGEST_END:]
    if hashlib.sha256(rest).digest() != data[len(MAGIC) : DIGEST_END]:
        raise PayloadError(f"The digest of the {title} does not match its content: it is truncated or altered.")
    manifest, end = _read_object(f"manifest of the {title}", rest, MAX_MANIFEST)
    return manifest, rest[end:]


def _read_object(what: str, data: memoryview, limit: int) -> tuple[dict[str, Any], int]:
    """The JSON object at the beginning of `data`, after its length, and where it ends."""
    length, limit = int.from_bytes(data[:8], "little"), max(0, min(limit, len(data) - 8))
    if length > limit:
        raise PayloadError(f"The {what} has {length:,} bytes, but it can have {limit:,} at most.")
    end = 8 + length
    try:
        value = json.loads(str(data[8:end], "utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"The {what} cannot be read: {shown(str(error))}.") from None
    if not isinstance(value, dict):
        raise PayloadError(f"The {what} is {shown(value)}, expected an object.")
    return value, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in it")
    return values


def read_tensors(title: str, data: memoryview, expected: LoraState) -> LoraState:
    """
    The tensors of a payload.

    Args:
        title (`str`): What errors call the payload.
        data (`memoryview`): Their bytes.
        expected (`dict[str, torch.Tensor]`): Tensors of the same names, shapes and dtypes.

    Raises:
        PayloadError: If tensors are missing or unknown, or one has another shape or dtype, or is not finite.
    """
    _check_header(title, data, expected)
    try:
        tensors = load(bytes(data))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise PayloadError(f"The tensors of the {title} cannot be read: {shown(str(error))}.") from None
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype:
            raise PayloadError(f"`{name}` of the {title} is {tensor.dtype}, expected {expected[name].dtype}.")
        # PyTorch cannot tell it of every dtype of 8 bits.
        if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():
            raise PayloadError(f"`{name}` of the {title} has values that are not finite.")
    return tensors


def _check_header(title: str, data: memoryview, expected: LoraState):
    """What safetensors lets pass (names that stand twice, values beside the tensors), and odd shapes that it fails at."""
    header, _ = _read_object(f"tensor header of the {title}", data, _max_header(expected))
    odd = header.keys() ^ expected.keys()
    if odd:
        names = ", ".join(map(shown, sorted(odd)[:3]))
        raise PayloadError(f"The {title} has missing or unknown tensors: {names} ({len(odd)} in all).")
    for name, entry in header.items():
        shape = list(expected[name].shape)
        complete = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not complete or entry["shape"] != shape:
            raise PayloadError(f"`{name}` of the {title} is described as {shown(entry)}, expected shape {shape}.")
