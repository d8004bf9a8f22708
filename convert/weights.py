"""A checkpoint's tensors as float32 rows, however they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.convert.checkpoint import Checkpoint, ExpectedTensor
from qwen2vl_q.convert.packed import PackedWeight, is_packed, packed_tensors
from qwen2vl_q.convert.quantization import Packing
from qwen2vl_q.convert.tensor_map import MappedTensor


class Weight(Protocol):
    """One tensor of the checkpoint."""

    @property
    def origin(self) -> str | None:
        """What it was quantized with; None for floats."""

    @property
    def kept(self) -> Sequence[str]:
        """The types whose blocks hold its integers as they are, the smallest first."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the first axis."""

    def blocks(self, start: int, stop: int, type: str) -> NDArray[np.uint8]:
        """The same rows as bytes of a type of `kept`."""


class StoredWeight:
    origin = None
    kept = ()

    def __init__(self, checkpoint: Checkpoint, name: str):
        self._checkpoint, self._name = checkpoint, name

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._checkpoint.read(self._name, start, stop)

    def blocks(self, start: int, stop: int, type: str) -> NDArray[np.uint8]:
        raise ValueError(f"{self._name}: {type}: not packed")


class Weights:
    """The checkpoint's tensors, each opened when it is wanted: a packed one holds its words meanwhile."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        packing: Packing | None,
        mapped: Sequence[MappedTensor],
        ignored: Sequence[str] = (),
    ):
        """Checks names, shapes and types of all. Raises FormatError, or UnsupportedError for biases that the
        model does not have."""
        self.checkpoint = checkpoint
        self._packing = packing
        names = {m.source for m in mapped}
        packed = [m.source for m in mapped if self._is_packed(m)]
        biases = [name.removesuffix("weight") + "bias" for name in packed]
        self.empty_biases = [b for b in biases if b not in names and b in checkpoint.tensors]
        checkpoint.check(
            [tensor for m in mapped for tensor in self._expected(m)], [*ignored, *self.empty_biases]
        )
        for name in self.empty_biases:
            self._require_zeros(name)

    def open(self, mapped: MappedTensor) -> Weight:
        """Raises FormatError where a packed tensor's parts do not fit together."""
        if self._packing is not None and self._is_packed(mapped):
            return PackedWeight(self.checkpoint, self._packing, mapped.source, mapped.source_shape[1])
        return StoredWeight(self.checkpoint, mapped.source)

    def place(self, mapped: MappedTensor) -> str:
        """Its file and name, for messages."""
        name = mapped.source
        if name not in self.checkpoint.tensors:
            name = name.removesuffix("weight") + "qweight"
        stored = self.checkpoint.tensors[name]
        return f"{stored.file}: tensor '{stored.name}'"

    def _is_packed(self, mapped: MappedTensor) -> bool:
        return (
            self._packing is not None
            and len(mapped.source_shape) == 2
            and is_packed(self.checkpoint, mapped.source)
        )

    def _expected(self, mapped: MappedTensor) -> list[ExpectedTensor]:
        if self._packing is not None and self._is_packed(mapped):
            rows, columns = mapped.source_shape
            return packed_tensors(self._packing, mapped.source, rows, columns)
        return [ExpectedTensor(mapped.source, mapped.source_shape)]

    def _require_zeros(self, name: str) -> None:
        """GPTQ's writers give every packed layer a bias."""
        stored = self.checkpoint.tensors[name]
        if stored.dtype in ("F32", "F16", "BF16") and not self.checkpoint.load(name).any():
            return
        raise UnsupportedError(
            f"{stored.file}: tensor '{stored.name}': Qwen2-VL has no bias there: expected zeros, found "
            f"{stored.dtype} values"
        )
