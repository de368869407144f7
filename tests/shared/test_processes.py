from types import SimpleNamespace

import pytest
import torch

from fedbiot_trainer.shared.processes import DeepSpeedSettings, deal, gathered, summed


class Process:
    """What `deal` asks an accelerator."""

    def __init__(self, process_index, num_processes):
        self.process_index, self.num_processes = process_index, num_processes


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_batch_counts_once_and_all_processes_are_as_busy(num_batches, num_processes):
    batches = [[i] for i in range(num_batches)]
    dealt = [list(deal(batches, Process(i, num_processes))) for i in range(num_processes)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(batch for mine in dealt for batch, counts in mine if counts) == batches


@pytest.mark.parametrize("section", ["optimizer", "scheduler"])
def test_optimizers_of_deepspeed_are_refused(section):
    config = {"zero_optimization": {"stage": 2}, section: {"type": "AdamW"}}
    with pytest.raises(ValueError, match=f"The DeepSpeed configuration has a `{section}` section"):
        DeepSpeedSettings(config)


def test_batch_sizes_are_each_trainers_own():
    config = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": "auto"}
    settings = DeepSpeedSettings(config)
    assert settings.config["train_micro_batch_size_per_gpu"] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == 4


def test_one_process_has_nothing_to_gather():
    parameter = torch.nn.Parameter(torch.zeros(3))
    with torch.no_grad(), gathered([parameter], write=True) as (whole,):
        whole.fill_(1)
    assert (parameter == 1).all()


@pytest.mark.parametrize("device, num_processes, moved", [("mps", 1, []), ("cuda", 2, ["cuda"])])
def test_totals_stay_where_float64_is(device, num_processes, moved):
    seen = []
    totals = type(
        "Totals", (), {"to": lambda self, device: seen.append(device) or torch.ones(2, dtype=torch.float64)}
    )()
    accelerator = SimpleNamespace(device=device, num_processes=num_processes, reduce=lambda tensor: 2 * tensor)
    found = summed(totals, accelerator)
    assert seen == moved
    assert found is totals or found.tolist() == [2.0, 2.0]
