"""Integers that share a scale, written as the block types that hold them as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
# From where to where a type's integers reach, the smallest type first. A block: float16 scale, integers.
_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}


def types_that_hold(lowest: int, highest: int) -> tuple[str, ...]:
    """The types whose integers reach from lowest to highest, the smallest first."""
    return tuple(type for type, (low, high) in _RANGES.items() if low <= lowest and highest <= high)


def integer_blocks(integers: NDArray[np.int16], scales: NDArray[np.float32], type: str) -> NDArray[np.uint8]:
    """Integers [rows, columns] with a scale a block [rows, columns / 32] -> bytes [rows, row_bytes].

    The integers are those of the type's range; a scale is rounded to float16.
    """
    rows, columns = integers.shape
    q = integers.reshape(rows, columns // BLOCK, BLOCK)
    d: NDArray[np.uint8] = np.ascontiguousarray(scales, "<f2")[..., None].view(np.uint8)
    parts = [d]
    if type == "Q8_0":
        parts.append(q.astype(np.uint8))
    else:
        raised = (q - _RANGES[type][0]).astype(np.uint8)
        if type == "Q5_0":
            parts.append(np.packbits(raised >> 4, axis=-1, bitorder="little").astype(np.uint8))
        low, high = np.split(raised & 15, 2, axis=-1)
        parts.append((low | high << 4).astype(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
