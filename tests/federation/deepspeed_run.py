"""
Launched by launches.py in several processes: `deepspeed_run.py SCRIPT ...` runs a script without DeepSpeed's collectives in
shared memory. Their processes wait for each other in a loop without pause, so that beside other tests most of a core's time
goes into waiting: beside two busy processes a run of 25 seconds took 290 to 340, and takes 47 to 77 without them.
"""

import runpy
import sys
from importlib import import_module


# `deepspeed.comm.torch`, as an attribute, is PyTorch's module.
import_module("deepspeed.comm.torch").build_shm_op = lambda: None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
