"""Payloads that somebody has altered: refused with a `PayloadError`, or what is decoded is what they carry."""

import hashlib
import json
import math
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedbiot_trainer import ClientUpdate, PayloadError, RoundStart
from fedbiot_trainer.wire.frame import DIGEST_END, MAGIC
from fedbiot_trainer.wire.messages import MAX_NAME, LocalWork


QUICK, MANY = 400, 10_000  # payloads of each kind

LORA = {"layers.0.lora_A.weight": torch.arange(6.0).view(2, 3), "layers.0.lora_B.weight": torch.ones(3, 2)}
HALF = {"layers.1.lora_A.weight": torch.full((1, 3), -0.5, dtype=torch.bfloat16), "scalar": torch.tensor(2.0)}
WORK = LocalWork(30, 60, 120, 600, 0.01, 7)
KINDS = {
    "round_start": (RoundStart(3, WORK, LORA, HALF), {"client_lora": LORA, "emulator_lora": HALF}),
    "client_update": (ClientUpdate(3, "north", 7, {"loss": 0.5, "tokens": 12}, LORA), {"client_lora": LORA}),
}
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def sealed(rest: bytes) -> bytes:
    return MAGIC + hashlib.sha256(rest).digest() + rest


def with_length(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def parts(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Manifest, tensor header and tensor data."""
    rest, found = data[DIGEST_END:], []
    for _ in range(2):
        end = 8 + int.from_bytes(rest[:8], "little")
        found.append(rest[8:end])
        rest = rest[end:]
    return *found, rest


# ---------------------------------------------------------------------------------------------------------------------
# Mutations. Each strategy gives the bytes that arrive.

NUMBERS = [0, 1, -1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64, 10**308, 10**400, 0.5, -0.5, 1e308]
LITERALS = [
    *map(str, NUMBERS),
    *("1e999", "-1e999", "-0.0", "-0", "1E5", "2.0", "3.0", "1" * 4300, "1" * 10_000, "NaN", "Infinity", "-Infinity"),
    *(
        "null",
        "true",
        "false",
        "[]",
        "{}",
        "",
        "[1",
        "0x1",
        "'a'",
        "[" * 900 + "]" * 900,
        "[" * 30_000,
        '{"a":' * 5000,
    ),
    *('""', '"3"', '"\\ud800"', '"a\\u0000b"', '"\\n"', '"../x"', '"n\\\\m"', '"\\u202e"', '"é"', f'"{"n" * 300}"'),
    *('"F16"', '"BF16"', '"I32"', '"U32"', '"F8_E8M0"', '"F4"', '"F64"', '"C64"', '"round_start"', '"client_update"'),
    *("[0]", "[2,3]", "[3,2]", "[6]", "[0,9223372036854775808]", "[2,3,1]", "[-2,-3]", "[2.0,3]", "[0,24]", "[24,48]"),
    *(
        "[24,0]",
        "[0,0]",
        "[0,18446744073709551615]",
        '{"loss":1,"loss":2}',
        '{"loss":1,"":2}',
        '{"loss":1,"\\u001b":2}',
    ),
    *('{"loss":-0.0}', '{"loss":null}', '{"lo\\u0073s":1}', '{"loss":[[[1]]]}', '{"a":1}'),
]
NAMES = [
    "seed",
    "loss",
    "client",
    "kind",
    "schema_version",
    "__metadata__",
    "shape",
    "dtype",
    "",
    "\ud800",
    "\x1b[2J",
    "a/b",
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=3),
    max_leaves=5,
).map(json.dumps)
literals = st.sampled_from(LITERALS) | json_values
names = st.sampled_from(NAMES) | st.text(max_size=5)


def places(value, at=()):
    """Every place in a nested object, as a path."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


@st.composite
def altered_object(draw, text: bytes) -> bytes:
    """A JSON object with something replaced, removed, added, renamed, put in twice, or written in another way."""
    value = json.loads(text)
    *path, last = draw(st.sampled_from(list(places(value))))
    holder = value
    for key in path:
        holder = holder[key]
    literal, action = draw(literals), draw(st.sampled_from(["replace", "remove", "add", "rename", "twice", "spaces"]))
    hole = "a hole for a literal"
    if action == "spaces":
        return json.dumps(value, indent=draw(st.sampled_from([1, "\t", "\r\n"]))).encode()
    if action == "remove" or (action == "rename" and isinstance(holder, list)):
        del holder[last]
    elif action == "rename":
        holder[draw(names)] = holder.pop(last)
    elif action == "replace" or isinstance(holder, list):
        holder[last] = hole
    elif action == "add":
        holder[draw(names)] = hole
    else:
        holder["a second time"] = draw(st.sampled_from([hole, holder[last]]))
    text = json.dumps(value).replace('"a second time"', json.dumps(last))
    return text.replace(f'"{hole}"', literal).encode("utf-8", "surrogatepass")


@st.composite
def altered_bytes(draw, data: bytes) -> bytes:
    """Bytes flipped, overwritten, cut out, put in, moved, or cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.integers(1, 16))
        action = draw(st.sampled_from(["flip", "overwrite", "cut", "insert", "repeat", "truncate"]))
        if action == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "overwrite":
            data[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif action == "cut":
            del data[at : at + size]
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=size))
        elif action == "repeat":
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def altered_values(draw, data: bytes) -> bytes:
    """Tensor data with a number overwritten, by one that is not finite among others."""
    at = draw(st.integers(0, len(data) - 4))
    number = draw(
        st.sampled_from(["0000807f", "000080ff", "0000c07f", "0100807f", "00000080", "ffff7f7f", "01000000"])
    )
    return data[:at] + bytes.fromhex(number) + data[at + 4 :]


@st.composite
def altered(draw, kind: str) -> bytes:
    """A payload that somebody has altered, or made up."""
    data = KINDS[kind][0].to_bytes()
    manifest, header, values = parts(data)
    how = draw(st.sampled_from(["manifest", "header", "values", "both", "bytes", "resealed", "length", "made up"]))
    if how == "bytes":  # the old digest
        return draw(altered_bytes(data))
    if how == "resealed":
        return sealed(draw(altered_bytes(data[DIGEST_END:])))
    if how == "length":
        lengths = (
            st.integers(0, 2**64 - 1) | st.integers(0, 600) | st.sampled_from([0, 2**16, 2**31, 2**63, 2**64 - 1])
        )
        wrong, first = draw(lengths).to_bytes(8, "little"), draw(st.booleans())
        tensors = (with_length(header) if first else wrong + header) + values
        return sealed((wrong + manifest if first else with_length(manifest)) + tensors)
    if how == "made up":
        other = next(payload for name, (payload, _) in KINDS.items() if name != kind)
        made_up = [
            other.to_bytes(),
            sealed(with_length(manifest) + save({})),
            sealed(with_length(manifest)),
            b"",
            MAGIC,
        ]
        return draw(st.sampled_from(made_up) | st.binary(max_size=99) | st.binary(max_size=99).map(sealed))
    if how in ("manifest", "both"):
        manifest = draw(altered_object(manifest) | altered_bytes(manifest))
    if how in ("header", "both"):
        header = draw(altered_object(header) | altered_bytes(header))
    if how == "values":
        values = draw(altered_values(values) | altered_bytes(values))
    return sealed(with_length(manifest) + with_length(header) + values)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold.


def unambiguous(pairs: list) -> dict:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def carried(data: bytes) -> tuple[str, dict]:
    """What a payload carries, read by other code than the package's."""
    manifest, header, values = parts(data)
    assert sum(map(len, (manifest, header, values))) + 16 + DIGEST_END == len(data)
    tensors, used = {}, 0
    for name, entry in json.loads(header, object_pairs_hook=unambiguous).items():
        start, stop = entry["data_offsets"]
        tensors[name] = (DTYPES[entry["dtype"]], entry["shape"], values[start:stop])
        used += stop - start
    assert used == len(values)
    return json.dumps(json.loads(manifest, object_pairs_hook=unambiguous), sort_keys=True), tensors


def content(payload) -> tuple[str, dict]:
    """The same of a decoded payload."""
    manifest = {name: getattr(payload, name) for name in payload.manifest_fields}
    if isinstance(payload, RoundStart):
        manifest["work"] = asdict(payload.work)
    tensors = {
        f"{group}/{name}": (tensor.dtype, list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for group in payload.tensor_fields
        for name, tensor in getattr(payload, group).items()
    }
    return json.dumps(manifest | {"kind": payload.kind, "schema_version": 2}, sort_keys=True), tensors


def receive(kind: str, data: bytes):
    payload, expected = KINDS[kind]
    return type(payload).from_bytes(data, None, **expected)


def check(kind: str, data: bytes, outcomes: Counter):
    started = time.perf_counter()
    try:
        payload = receive(kind, data)
    except PayloadError as error:
        text = str(error)
        assert (text[0].isupper() or text[0] == "`") and text.endswith(".") and len(text) < 500, text
        assert text.isprintable(), text
        outcomes["refused"] += 1
    else:
        original, expected = KINDS[kind]
        assert sealed(data[DIGEST_END:]) == data
        assert content(payload) == carried(data)
        assert content(receive(kind, payload.to_bytes())) == content(payload)
        for group, state in expected.items():
            got = getattr(payload, group)
            assert {name: (t.shape, t.dtype) for name, t in got.items()} == {
                n: (t.shape, t.dtype) for n, t in state.items()
            }
            assert all(torch.isfinite(tensor).all() for tensor in got.values())
        if isinstance(payload, ClientUpdate):
            assert payload.client.isprintable() and 1 <= len(payload.client) <= MAX_NAME
            assert all(name.isprintable() and math.isfinite(value) for name, value in payload.metrics.items())
        outcomes["same" if content(payload) == content(original) else "other values"] += 1
    assert time.perf_counter() - started < 5


def fuzz(kind: str, number: int, **changes) -> Counter:
    original, outcomes = KINDS[kind][0].to_bytes(), Counter()

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck), **changes)
    @given(altered(kind).filter(lambda data: data != original))
    def attack(data):
        check(kind, data, outcomes)

    attack()
    assert outcomes["refused"] > number / 2 and outcomes["other values"] > number / 100  # neither is vacuous
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_altered_payloads(kind):
    fuzz(kind, QUICK, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_altered_payloads(kind):
    outcomes = fuzz(kind, MANY)
    assert outcomes.total() >= MANY


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("literal", LITERALS, ids=lambda literal: f"{literal[:20]}-{len(literal)}")
def test_every_hostile_value_in_every_place(kind, literal):
    manifest, header, values = parts(KINDS[kind][0].to_bytes())
    for which, text in enumerate((manifest, header)):
        for *path, last in places(json.loads(text)):
            value = json.loads(text)
            holder = value
            for key in path:
                holder = holder[key]
            holder[last] = "a hole"
            pieces = [manifest, header]
            pieces[which] = json.dumps(value).replace('"a hole"', literal).encode()
            check(kind, sealed(with_length(pieces[0]) + with_length(pieces[1]) + values), Counter())


BOMBS = """
import hashlib, json, resource, sys, time
import torch
from fedbiot_trainer import ClientUpdate, PayloadError
from fedbiot_trainer.wire.frame import MAGIC

MB = 2**20
torch.set_num_threads(1)
state = {f"layers.{i}.lora_A.weight": torch.ones(256, 256) for i in range(32)}
update = ClientUpdate(1, "north", 7, {"loss": 0.5}, state)
good = update.to_bytes()
with_length = lambda content: len(content).to_bytes(8, "little") + content
sealed = lambda rest: MAGIC + hashlib.sha256(rest).digest() + rest
manifest = with_length(json.dumps(update._manifest()).encode())
entry = {"dtype": "F32", "shape": [256, 256], "data_offsets": [0, 2**18]}
described = lambda changes: json.dumps({f"client_lora/{name}": entry | changes for name in state}).encode()
bombs = {
    "too large": good + bytes(4 * MB),
    "manifest of lists": sealed(with_length(b"[[]" + b",[]" * (MB // 3) + b"]")),
    "header of lists": sealed(manifest + with_length(b"[[]" + b",[]" * (2 * MB) + b"]")),
    "header of names": sealed(manifest + with_length(json.dumps({f"n{i}": [] for i in range(10**5)}).encode())),
    "header of spaces": sealed(manifest + with_length(b" " * (6 * MB) + b"{}")),
    "deep header": sealed(manifest + with_length(b"[" * (6 * MB))),
    "long header": sealed(manifest + (2**40).to_bytes(8, "little") + bytes(6 * MB)),
    "long manifest": sealed((2**40).to_bytes(8, "little") + bytes(6 * MB)),
    "all overlap": sealed(manifest + with_length(described({})) + bytes(2**18)),
    "huge shapes": sealed(manifest + with_length(described({"shape": [2**31, 2**30]})) + bytes(2**18)),
}
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
# The payloads are here already: beside them, an honest one needs its bytes once more and its tensors.
resource.setrlimit(resource.RLIMIT_AS, (size + 24 * MB, resource.RLIM_INFINITY))
for name, data in bombs.items():
    started = time.perf_counter()
    try:
        ClientUpdate.from_bytes(data, client_lora=state)
    except PayloadError as error:
        print(f"{name}: {error}")
    else:
        sys.exit(f"{name} was accepted")
    if time.perf_counter() - started > 2:
        sys.exit(f"{name} took too long")
assert len(good) > 8 * MB
ClientUpdate.from_bytes(good, client_lora=state)
"""


@pytest.mark.trains
def test_bombs_take_neither_memory_nor_time():
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 10
