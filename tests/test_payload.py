import hashlib

import pytest
import torch
from safetensors.torch import save

from fedbiot_trainer import ClientUpdate, PayloadError, RoundStart
from fedbiot_trainer.wire.messages import MAGIC, check_lora


STATE = {"layers.0.lora_A.weight": torch.arange(6.0).view(2, 3), "layers.0.lora_B.weight": torch.ones(3, 2)}


@pytest.fixture
def update():
    return ClientUpdate(3, "north", 7, {"loss": 0.5}, STATE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(dtype):
    client, emulator = ({key: (tensor * x).to(dtype) for key, tensor in STATE.items()} for x in (1, 2))
    received = RoundStart.from_bytes(RoundStart(5, client, emulator).to_bytes(), server_round=5)
    assert received.server_round == 5
    for sent, got in ((client, received.client_lora), (emulator, received.emulator_lora)):
        assert got.keys() == sent.keys()
        assert all(torch.equal(got[key], sent[key]) and got[key].dtype == dtype for key in sent)


def test_update_round_trip(update):
    received = ClientUpdate.from_bytes(update.to_bytes(), server_round=3)
    assert (received.client, received.num_examples, received.metrics) == ("north", 7, {"loss": 0.5})


def test_payload_is_hardly_larger_than_its_tensors(update):
    update.client_lora = {"a": torch.zeros(1000, 100)}
    assert len(update.to_bytes()) < 1.002 * 400_000


def test_every_flipped_byte_is_noticed(update):
    data = update.to_bytes()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises(PayloadError, match="not a FedBiOT payload|digest does not match"):
            ClientUpdate.from_bytes(bytes(altered), server_round=3)


def test_every_truncation_is_noticed(update):
    data = update.to_bytes()
    for length in range(len(data)):
        with pytest.raises(PayloadError, match="truncated"):
            ClientUpdate.from_bytes(data[:length], server_round=3)


def sealed(manifest: bytes, tensors: bytes) -> bytes:
    """A payload whose digest is right, whatever is in it."""
    rest = len(manifest).to_bytes(8, "little") + manifest + tensors
    return MAGIC + hashlib.sha256(rest).digest() + rest


@pytest.mark.parametrize(
    "manifest, tensors, message",
    [
        (b"{", save({}), "it cannot be read"),
        (b"\xff\xfe", save({}), "it cannot be read"),
        (b"[]", save({}), "its manifest is not an object"),
        (b"{}", b"not safetensors", "it cannot be read"),
        (b"{}", save({}), "expected client_update of schema 1, got None"),
        (b'{"kind": "client_update", "schema_version": 2}', save({}), "got client_update of schema 2"),
        (
            b'{"kind": "client_update", "schema_version": 1}',
            save({"other/a": torch.ones(1)}),
            "unknown tensor `other/a`",
        ),
        (b'{"kind": "client_update", "schema_version": 1}', save({}), "`server_round` is None, expected"),
    ],
)
def test_content_that_nobody_of_ours_writes(manifest, tensors, message):
    with pytest.raises(PayloadError, match=message):
        ClientUpdate.from_bytes(sealed(manifest, tensors), server_round=3)


def test_payload_from_another_round(update):
    with pytest.raises(PayloadError, match="from round 3, but this is round 4"):
        ClientUpdate.from_bytes(update.to_bytes(), server_round=4)


def test_payload_of_another_kind(update):
    with pytest.raises(PayloadError, match="expected round_start of schema 1, got client_update"):
        RoundStart.from_bytes(update.to_bytes(), server_round=3)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_examples", 0, "`num_examples` is 0"),
        ("num_examples", 10**30, "`num_examples` is 10+, expected 1 to"),
        ("num_examples", "7", "`num_examples` is '7', expected a value of type int"),
        ("num_examples", True, "`num_examples` is True"),
        ("client", 1, "`client` is 1, expected a value of type str"),
        ("metrics", {"loss": float("nan")}, "metric `loss` is nan, expected a finite number"),
        ("metrics", {"loss": 10**400}, "metric `loss` is 10+, expected a finite number"),
        ("metrics", {"loss": "0.5"}, "metric `loss` is '0.5'"),
        ("metrics", {}, "metric `loss` is missing"),
    ],
)
def test_manifest_is_checked(update, field, value, message):
    setattr(update, field, value)
    with pytest.raises(PayloadError, match=message):
        ClientUpdate.from_bytes(update.to_bytes(), server_round=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.0.lora_B.weight": None}, "missing or unknown tensors: layers.0.lora_B.weight"),
        ({"extra": torch.ones(1)}, "missing or unknown tensors: extra"),
        ({"layers.0.lora_B.weight": torch.ones(2, 3)}, r"is torch.float32 \(2, 3\), expected torch.float32 \(3, 2\)"),
        ({"layers.0.lora_B.weight": torch.ones(3, 2).half()}, r"is torch.float16 \(3, 2\), expected torch.float32"),
        ({"layers.0.lora_B.weight": torch.full((3, 2), float("inf"))}, "values that are not finite"),
        ({"layers.0.lora_A.weight": torch.full((2, 3), float("nan"))}, "values that are not finite"),
    ],
)
def test_tensors_are_checked(change, message):
    received = {key: tensor for key, tensor in (STATE | change).items() if tensor is not None}
    with pytest.raises(PayloadError, match=message):
        check_lora("client LoRA", received, STATE)
    check_lora("client LoRA", STATE, STATE)
