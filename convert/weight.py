"""A tensor of a checkpoint as float32 rows, however it is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.checkpoint.tensors import Checkpoint


class Weight(ABC):
    """What the writer asks of a tensor."""

    @property
    def origin(self) -> str | None:
        """What it was quantized with; None for floats."""
        return None

    @property
    def kept(self) -> Sequence[str]:
        """The types whose blocks hold its integers as they are, the smallest first."""
        return ()

    @property
    def hindrance(self) -> str:
        """Why no type holds them, where one was quantized."""
        return ""

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the first axis."""

    def blocks(self, start: int, stop: int, type: str) -> NDArray[np.uint8]:
        """The same rows as bytes of a type of `kept`: [stop - start, row_bytes]."""
        raise ValueError(f"no type keeps its integers, {type} neither")


class StoredWeight(Weight):
    """One that is stored as floats."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._name = checkpoint, name

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._checkpoint.read(self._name, start, stop)
