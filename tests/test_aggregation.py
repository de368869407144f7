import itertools

import pytest
import torch

from fedbiot_trainer import ClientUpdate
from fedbiot_trainer.server.aggregation import FederatedAverage


def federated_average(updates):
    average = FederatedAverage()
    for update in updates:
        average.add(update)
    return average.result()


def make_update(client, num_examples, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return ClientUpdate(1, client, num_examples, {}, {"a": torch.randn(4, 5).to(dtype), "b": torch.randn(3).to(dtype)})


def test_weights_are_the_numbers_of_examples():
    one, two = make_update("x", 1, 0), make_update("y", 3, 1)
    average = federated_average([one, two])
    for key in average:
        assert torch.allclose(average[key], 0.25 * one.client_lora[key] + 0.75 * two.client_lora[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_updates_come_out_unchanged(count, dtype):
    updates = [make_update(f"c{i}", 3 * i + 1, seed=0, dtype=dtype) for i in range(count)]
    average = federated_average(updates)
    assert all(torch.equal(average[key], tensor) for key, tensor in updates[0].client_lora.items())


def test_order_does_not_matter():
    updates = [make_update(f"c{i}", i + 1, seed=i) for i in range(4)]
    expected = federated_average(updates)
    for order in itertools.permutations(updates):
        average = federated_average(list(order))
        assert all(torch.equal(average[key], expected[key]) for key in expected)


def test_nothing_to_average():
    with pytest.raises(ValueError, match="No update was added"):
        federated_average([])
