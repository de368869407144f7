"""
Run a script on a device with memory of its own, simulated on the CPU (simulated_device.cpp). It shows what a GPU would:
tensors left on the wrong device, and how much memory the device has to have, `torch.hpu.max_memory_allocated()`.

    python tests/simulated_device.py recipes/fedbiot_sft.py --num_rounds 2

The first time, it is built in ~/.cache/torch_extensions, for which PyTorch needs a C++ compiler and ninja. A build that
was killed leaves a file `lock` there, for which the next one waits: delete it.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import load


def register():
    """Build the device, if that was not done yet, and make it the one that Accelerate and transformers take."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of ninja
    device = load("simulated_device", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1", "-w"])
    device.is_available = device.is_initialized = lambda: True
    device.device_count, device.current_device = lambda: 1, lambda: 0
    device._is_in_bad_fork, device._lazy_init = lambda: False, lambda: None
    device.manual_seed_all = lambda seed: None  # the CPU's generator is used
    device.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("hpu", device)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "hpu"

    # Now that the device is there, and not before: these look for devices when they are imported.
    import accelerate.accelerator
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.accelerator.is_bf16_available = lambda ignore_tpu=False: True


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    register()
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path[0] = str(script.parent)
    runpy.run_path(str(script), run_name="__main__")
