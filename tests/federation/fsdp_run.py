"""
Launched by launches.py in several processes: `fsdp_run.py CONFIG SCRIPT ...` runs a script under the FSDP
settings of an Accelerate configuration, on the CPU, where Accelerate would take DDP.
"""

import os
import runpy
import sys

import accelerate.accelerator
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor


initialize, prepare_model = AcceleratorState.__init__, accelerate.accelerator.fsdp2_prepare_model


def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    new = not AcceleratorState._shared_state
    initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if new:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def prepare_and_check(accelerator, model):
    model = prepare_model(accelerator, model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return model


config, sys.argv = sys.argv[1], sys.argv[2:]
with open(config) as file:
    settings = yaml.safe_load(file)["fsdp_config"]
os.environ |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}
AcceleratorState.__init__ = initialize_with_fsdp
accelerate.accelerator.fsdp2_prepare_model = prepare_and_check
runpy.run_path(sys.argv[0], run_name="__main__")
