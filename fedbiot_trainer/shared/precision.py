"""Number formats that a machine is slow at."""

import torch
from transformers.utils import logging

from .compat import cpu_has_bf16


logger = logging.get_logger(__name__)


def warn_of_slow_bf16(device: torch.device, bf16: bool):
    """Warn if bfloat16 will be used on a CPU that has no instructions for it, which then takes each number apart."""
    if bf16 and device.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "This CPU has no instructions for bfloat16, so the run will be about ten times slower than in float32. Set "
            "`bf16=False`, and `model_init_kwargs={'dtype': 'float32'}` (or `--dtype float32`) for a model in bfloat16."
        )
