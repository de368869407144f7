"""Every setting, what it cannot be, and the presets over them."""

from .config import FedBiOTConfig


__all__ = ["FedBiOTConfig"]
