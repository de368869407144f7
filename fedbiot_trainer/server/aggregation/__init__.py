"""How the updates of a round become the next client LoRA: one file for each rule, one interface."""

from .fedavg import FederatedAverage
from .interface import Aggregate, Aggregator


__all__ = ["Aggregate", "Aggregator", "FederatedAverage"]
