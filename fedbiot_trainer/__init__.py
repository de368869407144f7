"""
FedBiOT as a Hugging Face Trainer plugin: federated fine-tuning of LLMs without handing out the full model.

Importing this changes one thing only: the usage telemetry that the libraries below send by default is off, as a privacy
tool should have it. HF_HUB_DISABLE_TELEMETRY=0 allows it. The libraries themselves are imported with the first name that
is used.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

if TYPE_CHECKING:
    from .client.client import FederatedClient
    from .client.trainer import ClientSFTTrainer
    from .config import FedBiOTConfig
    from .config.methods import METHODS
    from .data.partition import partition_dataset
    from .federation.methods import run_method
    from .federation.runner import FederatedRunner
    from .server.alignment import EmulatorAlignmentTrainer
    from .server.server import FederatedServer
    from .shared.round_trainer import DivergenceError
    from .wire.messages import ClientUpdate, PayloadError, RoundStart
    from .wire.package import EmulatorPackage
    from .wire.plan import TrainingPlan

_WHERE = {
    "METHODS": "config.methods",
    "ClientSFTTrainer": "client.trainer",
    "ClientUpdate": "wire.messages",
    "DivergenceError": "shared.round_trainer",
    "EmulatorAlignmentTrainer": "server.alignment",
    "EmulatorPackage": "wire.package",
    "FedBiOTConfig": "config",
    "FederatedClient": "client.client",
    "FederatedRunner": "federation.runner",
    "FederatedServer": "server.server",
    "PayloadError": "wire.messages",
    "RoundStart": "wire.messages",
    "TrainingPlan": "wire.plan",
    "partition_dataset": "data.partition",
    "run_method": "federation.methods",
}

__all__ = [
    "METHODS",
    "ClientSFTTrainer",
    "ClientUpdate",
    "DivergenceError",
    "EmulatorAlignmentTrainer",
    "EmulatorPackage",
    "FedBiOTConfig",
    "FederatedClient",
    "FederatedRunner",
    "FederatedServer",
    "PayloadError",
    "RoundStart",
    "TrainingPlan",
    "partition_dataset",
    "run_method",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


def _telemetry_off():
    if not os.environ.get("HF_HUB_DISABLE_TELEMETRY"):  # empty is no answer, though the Hub's library takes it for one
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    wanted = os.environ["HF_HUB_DISABLE_TELEMETRY"].upper() in ("1", "ON", "YES", "TRUE")
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None and wanted:  # it has read the environment already
        constants.HF_HUB_DISABLE_TELEMETRY = True


_telemetry_off()
