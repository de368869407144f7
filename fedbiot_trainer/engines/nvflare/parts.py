"""A payload as NVFlare carries it best: large arrays are streamed in their parts, small bytes go with the message."""

from collections.abc import Sequence
from typing import Any

import numpy as np


PART = 2 * 1024 * 1024  # bytes


def split(payload: bytes) -> list[bytes | np.ndarray]:
    """Parts of a payload, which share its memory. None of them is ever pickled."""
    if len(payload) <= PART:
        return [payload]
    starts = range(0, len(payload), PART)
    return [np.frombuffer(payload, np.uint8, min(PART, len(payload) - start), start) for start in starts]


def views(parts: Any) -> list[memoryview]:
    """
    The bytes of each part, as they came.

    Raises:
        TypeError: If these are no parts of a payload.
    """
    if not isinstance(parts, Sequence) or not all(_is_part(part) for part in parts):
        raise TypeError("A payload comes as a list of bytes or of flat arrays of uint8.")
    return [memoryview(part) for part in parts]


def _is_part(part: Any) -> bool:
    return isinstance(part, bytes) or (isinstance(part, np.ndarray) and part.dtype == np.uint8 and part.ndim == 1)
