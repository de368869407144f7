"""Files of a federation's state that are damaged: a `ValueError`, or the state that was saved."""

import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fedbiot_trainer.federation.state import FederationState
from fedbiot_trainer.shared.records import RoundRecord


QUICK, MANY = 200, 3_000
LORA = {"layers.0.lora_A.weight": torch.arange(6.0).view(2, 3), "layers.0.lora_B.weight": torch.ones(3, 2)}
STATE = FederationState(
    server_round=1,
    client_lora=LORA,
    emulator_lora={
        "layers.1.lora_A.weight": torch.full((2, 2), -0.5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3),
    },
    aggregator={"examples": {"north": 7}, "sums": {"a": torch.zeros(2, dtype=torch.float64)}, "history": [1, [2.5]]},
    alignment_steps=10,
    client_steps={"north": 30, "Zürich": 60},
    settings={"learning_rate": 1e-3, "model": "tiny"},
    initial_alignment={"alignment_l2": 0.25},
    zero_shot={"loss": 2.0},
    records=[RoundRecord(1, client_losses={"north": 0.5}, counted=True)],
    open_round=RoundRecord(2, refused={"north": "it was late"}),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return STATE.save(tmp_path_factory.mktemp("states"), keep=1)


def plain(value):
    """Something that `==` compares, bit by bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, list(value.shape), value.reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return plain(vars(value)) if isinstance(value, FederationState | RoundRecord) else repr(value)


@st.composite
def damages(draw, data: bytes) -> bytes:
    """What may become of a file: bits flipped, blocks zeroed, overwritten, cut out or doubled, its end lost."""
    end = 8 + int.from_bytes(data[:8], "little")
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        last = max(0, len(data) - 1)
        at = draw(st.integers(0, last) | st.integers(0, min(end, last)))
        size = draw(st.integers(1, 64) | st.just(4096))
        how = draw(st.sampled_from(["flip", "zero", "overwrite", "cut", "double", "truncate", "append", "retype"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "zero":
            data[at : at + size] = bytes(len(data[at : at + size]))
        elif how == "overwrite":
            data[at : at + 8] = draw(st.binary(min_size=8, max_size=8))
        elif how == "cut":
            del data[at : at + size]
        elif how == "double":
            data[at:at] = data[at : at + size]
        elif how == "truncate":
            del data[at:]
        elif how == "append":
            data += draw(st.binary(min_size=1, max_size=8))
        else:  # other words of the same length, where a file says what its bytes are
            words = [(b'"F32"', b'"I32"'), (b'"BF16"', b'"F16" '), (b"[2,3]", b"[3,2]"), (b"[2,2]", b"[4,1]")]
            words += [(b'"F64"', b'"I64"'), (b'"I64"', b'"U64"'), (b"lora_A", b"lora_C"), (b"schema", b"schemE")]
            old, new = draw(st.sampled_from(words))
            data = data.replace(old, new)
    return bytes(data)


def fuzz(file, number, **changes) -> Counter:
    original, outcomes = file.read_bytes(), Counter()
    damaged = file.with_name("damaged.safetensors")

    @settings(max_examples=number, deadline=None, database=None, suppress_health_check=list(HealthCheck), **changes)
    @given(damages(original))
    @example(original)
    @example(b"")
    def load(data):
        damaged.write_bytes(data)
        try:
            state = FederationState.load(damaged)
        except ValueError as error:
            assert re.match(r"The state '.*damaged\.safetensors' (is damaged: .|has schema version )", str(error))
            outcomes["refused"] += 1
        else:
            assert plain(state) == plain(STATE)
            outcomes["the same"] += 1

    load()
    assert outcomes["refused"] > number / 2 and outcomes["the same"] >= 1
    return outcomes


def test_damaged_states(saved):
    fuzz(saved, QUICK, derandomize=True)


@pytest.mark.slow
def test_many_damaged_states(saved):
    assert fuzz(saved, MANY).total() >= MANY


def test_truncations_and_flipped_bits_of_a_state_are_noticed(saved):
    original, damaged = saved.read_bytes(), saved.with_name("damaged.safetensors")
    cut = [original[:length] for length in range(0, len(original), 17)]
    places = range(0, len(original), 5)
    flipped = [original[:i] + bytes([original[i] ^ 1 << i % 8]) + original[i + 1 :] for i in places]
    for data in cut + flipped:
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match="The state '.*' is damaged: ."):
            FederationState.load(damaged)


@pytest.mark.parametrize(
    "dtype, shape, size",
    [("F8_E8M0", [2], 2), ("F4", [2], 1), ("F32", [0, 2**62, 2**62], 0), ("F32", [0, 2**63], 0)],
    ids=str,
)
def test_tensors_that_pytorch_cannot_hold(saved, dtype, shape, size):
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    damaged = saved.with_name("damaged.safetensors")
    damaged.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ValueError, match="The state '.*' is damaged: ."):
        FederationState.load(damaged)
