import hashlib
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save

from fedbiot_trainer import ClientUpdate, FederatedClient, PayloadError, RoundStart
from fedbiot_trainer.wire.frame import MAGIC, MAX_MANIFEST, max_bytes, shown
from fedbiot_trainer.wire.messages import MAX_NAME, LocalWork, RoundStarts, check_client_name


STATE = {"layers.0.lora_A.weight": torch.arange(6.0).view(2, 3), "layers.0.lora_B.weight": torch.ones(3, 2)}
WORK = LocalWork(
    local_steps=30, first_step=60, schedule_step=120, schedule_length=600, proximal_weight=0.01, seed=2**32 - 1
)


@pytest.fixture
def update():
    return ClientUpdate(3, "north", 7, {"loss": 0.5}, STATE)


def receive(data, server_round=3, state=STATE):
    return ClientUpdate.from_bytes(data, server_round, client_lora=state)


def sealed(manifest: bytes, tensors: bytes) -> bytes:
    """A payload whose digest is right, whatever is in it."""
    rest = len(manifest).to_bytes(8, "little") + manifest + tensors
    return MAGIC + hashlib.sha256(rest).digest() + rest


def described(header: bytes | dict, data: bytes) -> bytes:
    """What safetensors would read, whatever stands in its header."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def update_with(tensors: bytes, manifest: bytes | None = None) -> bytes:
    """A client update with other tensors, or with another manifest."""
    return sealed(manifest or json.dumps(ClientUpdate(3, "north", 7, {"loss": 0.5}, {})._manifest()).encode(), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype):
    client, emulator = ({key: (tensor * x).to(dtype) for key, tensor in STATE.items()} for x in (1, 2))
    data = RoundStart(5, WORK, client, emulator).to_bytes()
    received = RoundStart.from_bytes(data, 5, client_lora=client, emulator_lora=emulator)
    assert (received.server_round, received.work) == (5, WORK)
    for sent, got in ((client, received.client_lora), (emulator, received.emulator_lora)):
        assert got.keys() == sent.keys()
        assert all(torch.equal(got[key], sent[key]) and got[key].dtype == dtype for key in sent)


def test_update_round_trip(update):
    received = receive(update.to_bytes())
    assert (received.client, received.num_examples, received.metrics) == ("north", 7, {"loss": 0.5})


def test_payloads_of_a_round_are_those_of_its_clients():
    works = {"north": WORK, "south": replace(WORK, seed=1)}
    starts = RoundStarts(2, works, STATE, {})
    assert list(starts) == ["north", "south"] and len(starts) == 2
    for name, work in works.items():
        assert starts[name] == RoundStart(2, work, STATE, {}).to_bytes()
        assert starts.size(name) == len(starts[name])


def test_payload_is_hardly_larger_than_its_tensors(update):
    update.client_lora = {"a": torch.zeros(1000, 100)}
    assert len(update.to_bytes()) < 1.002 * 400_000


def test_every_flipped_byte_is_noticed(update):
    data = update.to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises(PayloadError, match="not a FedBiOT payload|digest of the client update does not match"):
            receive(bytes(altered))


def test_every_truncation_is_noticed(update):
    data = update.to_bytes()
    for length in range(len(data)):
        with pytest.raises(PayloadError, match="truncated"):
            receive(data[:length])


GOOD = b'"kind": "client_update", "schema_version": 2'


@pytest.mark.parametrize(
    "manifest, message",
    [
        (b"{", "The manifest of the client update cannot be read"),
        (b"\xff\xfe", "The manifest of the client update cannot be read: .*'utf-8' codec"),
        ("{}".encode("utf-16"), "The manifest of the client update cannot be read: .*'utf-8' codec"),
        (b'{"client": "\xed\xa0\x80"}', "The manifest of the client update cannot be read: .*'utf-8' codec"),
        (b"[" * 60_000, "The manifest of the client update cannot be read: .*maximum recursion depth"),
        (b'{"a":' * 10_000, "The manifest of the client update cannot be read: .*maximum recursion depth"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "The manifest of the client update cannot be read: .*4300 digits"),
        (b'{"loss": 1, "loss": 2}', "cannot be read: 'a name stands twice in it'"),
        (b'{"a": 1, "\\u0061": 2}', "cannot be read: 'a name stands twice in it'"),
        (b"[]", r"The manifest of the client update is \[\], expected an object"),
        (b" " * (MAX_MANIFEST + 1), "The manifest of the client update has 65,537 bytes, but it can have 65,536"),
        (b"{}", "The payload is None of schema None, expected client_update of schema 2"),
        (b'{"kind": "client_update", "schema_version": 1}', "is 'client_update' of schema 1, expected"),
        (b'{"kind": "client_update", "schema_version": 2.0}', "is 'client_update' of schema 2.0, expected"),
        (b'{"kind": "\\u001b[2J", "schema_version": 2}', r"The payload is '\\x1b\[2J' of schema 2"),
        (b"{%b}" % GOOD, "`server_round` of the client update is None, expected a value of type int"),
        (b'{%b, "\\ud800": 1}' % GOOD, r"The client update has unknown values: \['\\ud800'\]"),
    ],
    ids=lambda value: f"{value[:24]!r}" if isinstance(value, bytes) else None,
)
def test_manifests_that_nobody_of_ours_writes(manifest, message):
    with pytest.raises(PayloadError, match=message):
        receive(sealed(manifest, save({})))


A, B = (f"client_lora/{key}" for key in STATE)
ENTRIES = {
    A: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    B: {"dtype": "F32", "shape": [3, 2], "data_offsets": [24, 48]},
}


@pytest.mark.parametrize(
    "header, message",
    [
        (b"{", "The tensor header of the client update cannot be read"),
        (b"[" * 1000, "The tensor header of the client update cannot be read|is .*, expected an object"),
        (json.dumps(ENTRIES).encode()[:-1] + b', "%b": {}}' % A.encode(), "a name stands twice in it"),
        (ENTRIES | {"__metadata__": {"more": "text"}}, r"missing or unknown tensors: '__metadata__' \(1 in all\)"),
        (ENTRIES | {"other/a": ENTRIES[A]}, r"missing or unknown tensors: 'other/a' \(1 in all\)"),
        (ENTRIES | {"\x1b[2J": ENTRIES[A]}, r"missing or unknown tensors: '\\x1b\[2J' \(1 in all\)"),
        ({A: ENTRIES[A]}, r"missing or unknown tensors: 'client_lora/layers.0.lora_B.weight' \(1 in all\)"),
        ({}, r"missing or unknown tensors: .* \(2 in all\)"),
        (ENTRIES | {A: ENTRIES[A] | {"more": 1}}, "is described as .*'more': 1.*, expected shape"),
        (ENTRIES | {A: list(ENTRIES[A].values())}, r"is described as \['F32', .*, expected shape \[2, 3\]"),
        (ENTRIES | {A: ENTRIES[A] | {"shape": [3, 2]}}, r"is described as .*\[3, 2\].*, expected shape \[2, 3\]"),
        (ENTRIES | {A: ENTRIES[A] | {"shape": [0, 2**63]}}, r"is described as .*, expected shape \[2, 3\]"),
        (ENTRIES | {A: ENTRIES[A] | {"shape": [2.0, 3]}}, "The tensors of the client update cannot be read"),
        (ENTRIES | {A: ENTRIES[A] | {"dtype": "F16"}}, "The tensors of the client update cannot be read"),
        (ENTRIES | {A: ENTRIES[A] | {"dtype": "I32"}}, "is torch.int32, expected torch.float32"),
        (ENTRIES | {A: ENTRIES[A] | {"data_offsets": [24, 48]}}, "The tensors of the client update cannot be read"),
        (ENTRIES | {A: ENTRIES[A] | {"data_offsets": [0, 2**62]}}, "The tensors of the client update cannot be read"),
        (ENTRIES | {A: ENTRIES[A] | {"data_offsets": [24, 0]}}, "The tensors of the client update cannot be read"),
    ],
)
def test_tensor_headers_that_nobody_of_ours_writes(header, message):
    receive(update_with(described(ENTRIES, bytes(48))))
    with pytest.raises(PayloadError, match=message):
        receive(update_with(described(header, bytes(48))))


@pytest.mark.parametrize("dtype, size", [("F4", 1), ("F6_E2M3", 1), ("F8_E8M0", 2)])
def test_dtypes_that_pytorch_does_not_have(dtype, size):
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, size]}
    with pytest.raises(PayloadError, match="The tensors of the client update cannot be read"):
        receive(update_with(described({"client_lora/a": entry}, bytes(size))), state={"a": torch.zeros(2)})


@pytest.mark.parametrize("length", [2**16, 2**32, 2**63, 2**64 - 1])
def test_headers_that_are_longer_than_their_model_needs(length):
    with pytest.raises(
        PayloadError, match=r"The tensor header of the client update has [\d,]+ bytes, but it can have"
    ):
        receive(update_with(length.to_bytes(8, "little") + bytes(100)))
    rest = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(PayloadError, match="The manifest of the client update has .* bytes, but it can have"):
        receive(MAGIC + hashlib.sha256(rest).digest() + rest)


def test_data_beside_the_tensors_is_refused():
    with pytest.raises(PayloadError, match="The tensors of the client update cannot be read: .*not fully covered"):
        receive(update_with(described(ENTRIES, bytes(49))))


def test_payloads_larger_than_their_model_allows_are_not_read(update, monkeypatch):
    limit = max_bytes({f"client_lora/{key}": tensor for key, tensor in STATE.items()})
    data = update.to_bytes().ljust(limit + 1, b"\x00")
    monkeypatch.setattr(hashlib, "sha256", None)
    with pytest.raises(
        PayloadError, match=f"has {limit + 1:,} bytes, but for this model it can have {limit:,} at most"
    ):
        receive(data)


def test_the_largest_update_fits_the_limit(update):
    update.client, update.num_examples = "n" * MAX_NAME, 10**12
    update.metrics = {"loss": -1.7976931348623157e308, **{f"{i:0{MAX_NAME}}": -2.0e-308 for i in range(63)}}
    assert len(receive(update.to_bytes()).metrics) == 64


def test_payload_from_another_round(update):
    with pytest.raises(PayloadError, match="The client update is from round 3, but this is round 4"):
        receive(update.to_bytes(), server_round=4)


def test_payload_of_another_kind(update):
    message = "The payload is 'client_update' of schema 2, expected round_start of schema 2"
    with pytest.raises(PayloadError, match=message):
        RoundStart.from_bytes(update.to_bytes(), 3, client_lora=STATE, emulator_lora={})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("server_round", -1, "`server_round` of the client update is -1, which is no round"),
        ("server_round", 10**30, r"`server_round` of the client update is 10+, which is no round"),
        ("num_examples", 0, "`num_examples` of the client update is 0, expected 1 to"),
        ("num_examples", 10**30, "`num_examples` of the client update is 10+, expected 1 to"),
        ("num_examples", "7", "`num_examples` of the client update is '7', expected a value of type int"),
        ("num_examples", True, "`num_examples` of the client update is True, expected a value of type int"),
        ("client", 1, "`client` of the client update is 1, expected a value of type str"),
        ("client", "", "The name of client '' has 0 characters"),
        ("client", "n" * (MAX_NAME + 1), "has 257 characters. Give it one of 1 to 256"),
        ("client", "north\nsouth", r"The name of client 'north\\nsouth' has characters that cannot be printed"),
        ("client", "\ud800", r"The name of client '\\ud800' has characters that cannot be printed"),
        ("client", "a\u202egpj.exe", "has characters that cannot be printed"),
        ("metrics", {"loss": math.nan}, "Metric `loss` of the client update is nan, expected a finite number"),
        ("metrics", {"loss": -math.inf}, "Metric `loss` of the client update is -inf, expected a finite number"),
        ("metrics", {"loss": 10**400}, "Metric `loss` of the client update is 10+, expected a finite number"),
        ("metrics", {"loss": "0.5"}, "Metric `loss` of the client update is '0.5', expected a finite number"),
        ("metrics", {"loss": True}, "Metric `loss` of the client update is True, expected a finite number"),
        ("metrics", {"loss": 1, "\x1b": 1}, r"Metric '\\x1b' of the client update has a name that"),
        ("metrics", {"loss": 1, "m" * 257: 1}, "Metric 'm+ of the client update has a name that is too long"),
        ("metrics", {}, "Metric `loss` of the client update is missing"),
        ("metrics", {str(i): 0 for i in range(64)} | {"loss": 1}, "The client update has 65 metrics, 64 at most"),
    ],
)
def test_manifest_is_checked(update, field, value, message):
    setattr(update, field, value)
    with pytest.raises(PayloadError, match=message) as caught:
        receive(update.to_bytes())
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"local_steps": 0}, "`local_steps` of the work order is 0, expected a number from 1 to"),
        ({"local_steps": True}, "`local_steps` of the work order is True"),
        ({"first_step": 1.0}, "`first_step` of the work order is 1.0"),
        ({"schedule_step": -1}, "`schedule_step` of the work order is -1, expected a number from 0 to"),
        ({"schedule_length": 2**53 + 1}, r"`schedule_length` of the work order is 9\d+, expected"),
        ({"proximal_weight": math.nan}, "`proximal_weight` of the work order is nan"),
        ({"proximal_weight": math.inf}, "`proximal_weight` of the work order is inf"),
        ({"proximal_weight": -0.1}, "`proximal_weight` of the work order is -0.1"),
        ({"seed": 2**32}, "`seed` of the work order is 4294967296, expected a number from 0 to 4,294,967,295"),
        ({"seed": None}, "`seed` of the work order is None"),
        ({"more": 1}, "The work order must have exactly local_steps, .*, got "),
    ],
)
def test_work_order_is_checked(changes, message):
    with pytest.raises(PayloadError, match=message):
        LocalWork.parse(asdict(WORK) | changes)


@pytest.mark.parametrize("value", [None, [], 1, {}, {"local_steps": 1}], ids=repr)
def test_work_orders_that_are_none(value):
    with pytest.raises(PayloadError, match="The work order must have exactly local_steps, first_step, .*, got "):
        LocalWork.parse(value)


FLOATS = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_must_be_finite(update, dtype, value):
    if dtype == torch.float8_e4m3fn:
        value = math.nan  # it has no infinity
    update.client_lora = {"a": torch.ones(3).to(dtype), "b": torch.tensor([0, value, 1]).to(dtype)}
    expected = {name: torch.zeros(3).to(dtype) for name in update.client_lora}
    with pytest.raises(PayloadError, match="`client_lora/b` of the client update has values that are not finite"):
        receive(update.to_bytes(), state=expected)


def test_client_names_as_people_give_them():
    for name in ("north", "clinic a", "Zürich (2)", "東京", "-1", "a/b", "..", "n" * MAX_NAME):
        check_client_name(name)


def test_client_names_are_checked_before_anything_is_trained():
    with pytest.raises(ValueError, match=r"The name of client 'a\\nb' has characters that cannot be printed. Give it"):
        FederatedClient("a\nb", None, None)


def test_hostile_values_in_errors():
    nested = []
    for _ in range(10_000):
        nested = [nested]
    assert shown(nested) == "a value of type list that is too long to show"
    assert shown(10**5000) == "a value of type int that is too long to show"
    assert shown("\x1b[2J\n\ud800\u202e") == r"'\x1b[2J\n\ud800\u202e'"
    assert shown("x" * 1000) == "'" + "x" * 99
