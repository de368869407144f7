"""The held-out private prompts of the demo, for lm_eval."""

import runpy
from pathlib import Path

from datasets import Dataset


def held_out(seed: int = 0, **metadata) -> dict[str, Dataset]:
    """What a run of the demo with this `seed` is evaluated on; the sizes are those of its training sets."""
    task = runpy.run_path(str(Path(__file__).parents[1] / "task.py"))
    return {"test": task["private_domains"]({"clinic": 300, "shop": 450, "library": 600}, seed=seed)[1]}
