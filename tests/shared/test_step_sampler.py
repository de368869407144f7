import pytest

from fedbiot_trainer.shared.step_sampler import StepSampler


@pytest.mark.parametrize("num_examples, batch_size", [(10, 4), (8, 4), (3, 5)])
def test_rounds_continue_one_another(num_examples, batch_size):
    whole = list(StepSampler(num_examples, batch_size, seed=0, start=0, stop=12))
    parts = [
        batch for start in range(0, 12, 3) for batch in StepSampler(num_examples, batch_size, 0, start, start + 3)
    ]
    assert parts == whole
    per_epoch = -(-num_examples // batch_size)
    for epoch in range(12 // per_epoch):
        seen = sum(whole[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert sorted(seen) == list(range(num_examples))


def test_dropping_the_last_batch_of_everything():
    assert len(list(StepSampler(10, 4, 0, 0, 5, drop_last=True))[2]) == 4
    with pytest.raises(ValueError, match="`per_device_train_batch_size` is 4, but there are only 3 examples"):
        StepSampler(3, 4, 0, 0, 5, drop_last=True)
