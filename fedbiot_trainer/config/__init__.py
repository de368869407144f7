"""Every setting, what it cannot be, and the presets over them."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import FedBiOTConfig

__all__ = ["FedBiOTConfig"]


def __getattr__(name: str) -> Any:
    # The settings are checked before torch is imported, which the whole configuration needs.
    if name != "FedBiOTConfig":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from .config import FedBiOTConfig

    return FedBiOTConfig
