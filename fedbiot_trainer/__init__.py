"""FedBiOT as a Hugging Face Trainer plugin: federated fine-tuning of LLMs without handing out the full model."""

import os


# The libraries below send usage telemetry by default. A privacy tool does not; HF_HUB_DISABLE_TELEMETRY=0 allows it.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import huggingface_hub.constants  # noqa: E402


huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = os.environ["HF_HUB_DISABLE_TELEMETRY"].upper() in (
    "1",
    "ON",
    "YES",
    "TRUE",
)

from .alignment import EmulatorAlignmentTrainer  # noqa: E402
from .client import ClientSFTTrainer, FederatedClient  # noqa: E402
from .config import FedBiOTConfig  # noqa: E402
from .methods import METHODS, run_method  # noqa: E402
from .package import EmulatorPackage  # noqa: E402
from .partition import partition_dataset  # noqa: E402
from .payload import ClientUpdate, PayloadError, RoundStart  # noqa: E402
from .runner import FederatedRunner  # noqa: E402
from .server import FederatedServer  # noqa: E402


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ClientSFTTrainer",
    "ClientUpdate",
    "EmulatorAlignmentTrainer",
    "EmulatorPackage",
    "FedBiOTConfig",
    "FederatedClient",
    "FederatedRunner",
    "FederatedServer",
    "PayloadError",
    "RoundStart",
    "partition_dataset",
    "run_method",
]
