import pytest
import torch

from fedbiot_trainer.shared import precision


@pytest.mark.parametrize(
    "device, bf16, has, warns",
    [("cpu", True, False, 1), ("cpu", True, True, 0), ("cpu", False, False, 0), ("cuda", True, False, 0)],
)
def test_bf16_on_a_cpu_without_instructions_for_it_is_warned_of(monkeypatch, device, bf16, has, warns):
    told = []
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(precision.logger, "warning", told.append)
    precision.warn_of_slow_bf16(torch.device(device), bf16)
    assert [text[:44] for text in told] == ["This CPU has no instructions for bfloat16, s"] * warns
