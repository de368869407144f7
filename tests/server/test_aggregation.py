import itertools

import pytest
import torch
from conftest import random_lora

from fedbiot_trainer import ClientUpdate
from fedbiot_trainer.server.aggregation import FederatedAverage


SHAPES = {"a": (4, 5), "b": (3,)}


def federated_average(updates, dtype=torch.float32):
    average = FederatedAverage()
    average.begin({key: torch.zeros(shape, dtype=dtype) for key, shape in SHAPES.items()})
    for update in updates:
        average.add(update)
    return average.finish()


def make_update(client, num_examples, seed, dtype=torch.float32):
    like = {key: torch.empty(shape, dtype=dtype) for key, shape in SHAPES.items()}
    return ClientUpdate(1, client, num_examples, {}, random_lora(like, size=1.0, seed=seed))


def test_weights_are_the_numbers_of_examples():
    one, two = make_update("x", 1, 0), make_update("y", 3, 1)
    aggregate = federated_average([one, two])
    assert aggregate.weights == {"x": 0.25, "y": 0.75}
    for key, average in aggregate.client_lora.items():
        assert torch.allclose(average, 0.25 * one.client_lora[key] + 0.75 * two.client_lora[key])


def test_mean_is_exact_to_the_bit():
    updates = [make_update(f"c{i}", 7 * i + 3, seed=i) for i in range(5)]
    average = federated_average(updates).client_lora
    total = sum(update.num_examples for update in updates)
    for key, tensor in average.items():
        exact = sum(update.num_examples * update.client_lora[key].double() for update in updates) / total
        assert torch.equal(tensor, exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_updates_come_out_unchanged(count, dtype):
    updates = [make_update(f"c{i}", 3 * i + 1, seed=0, dtype=dtype) for i in range(count)]
    average = federated_average(updates, dtype).client_lora
    assert all(torch.equal(average[key], tensor) for key, tensor in updates[0].client_lora.items())


def test_order_does_not_matter():
    updates = [make_update(f"c{i}", i + 1, seed=i) for i in range(4)]
    expected = federated_average(updates).client_lora
    for order in itertools.permutations(updates):
        average = federated_average(order).client_lora
        assert all(torch.equal(average[key], expected[key]) for key in expected)


def test_nothing_to_average():
    with pytest.raises(ValueError, match="No update was added"):
        federated_average([])
