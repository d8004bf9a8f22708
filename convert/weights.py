"""A checkpoint's tensors, found and checked: as floats, packed, or with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.checkpoint.lora import Adapter, Update
from qwen2vl_q.checkpoint.tensor_map import MappedTensor
from qwen2vl_q.checkpoint.tensors import FLOATS, Checkpoint, ExpectedTensor
from qwen2vl_q.convert import bitsandbytes, packed
from qwen2vl_q.convert.quantization import Packing
from qwen2vl_q.convert.weight import StoredWeight, Weight


class AdaptedWeight(Weight):
    """Another one with the updates of adapters, one after the other."""

    def __init__(self, base: Weight, updates: Sequence[Update]):
        self._base, self._updates = base, updates

    @property
    def origin(self) -> str | None:
        return f"{self._base.origin} and LoRA" if self._base.origin else None

    @property
    def hindrance(self) -> str:
        return "what is added changes them"

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        values = self._base.read(start, stop)
        for update in self._updates:
            values = update.apply(values, start, stop)
        return values


class SavedWeight(Weight):
    """A whole tensor of an adapter, in place of the base's."""

    def __init__(self, adapter: Adapter, name: str):
        self._adapter, self._name = adapter, name

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        return self._adapter.read_whole(self._name, start, stop)


class _Reader(NamedTuple):
    """How a method's matrices are found, checked and read."""

    is_packed: Callable[[Checkpoint, str], bool]
    tensors: Callable[[Checkpoint, Packing, str, int, int], list[ExpectedTensor]]
    open: Callable[[Checkpoint, Packing, str, int, int], Weight]


_WORDS = _Reader(packed.is_packed, packed.packed_tensors, packed.PackedWeight)
_READERS = {
    "GPTQ": _WORDS,
    "AWQ": _WORDS,
    "bitsandbytes": _Reader(bitsandbytes.is_packed, bitsandbytes.packed_tensors, bitsandbytes.PackedWeight),
}


class Weights:
    """The checkpoint's tensors, each opened when it is wanted: a packed one holds its words meanwhile."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        packing: Packing | None,
        mapped: Sequence[MappedTensor],
        ignored: Sequence[str] = (),
        adapters: Sequence[Adapter] = (),
    ):
        """Checks names, shapes and types of all. Raises FormatError, or UnsupportedError for biases that the
        model does not have."""
        self.checkpoint = checkpoint
        self._packing = packing
        names = {m.source for m in mapped}
        biases = [m.source.removesuffix("weight") + "bias" for m in mapped if self._is_packed(m)]
        self.empty_biases = [b for b in biases if b not in names and b in checkpoint.tensors]
        checkpoint.check(
            [tensor for m in mapped for tensor in self._expected(m)], [*ignored, *self.empty_biases]
        )
        for name in self.empty_biases:
            self._require_zeros(name)
        self._adapters = adapters
        shapes = {m.source: m.source_shape for m in mapped}
        for i, adapter in enumerate(adapters):
            adapter.check(shapes)
            for other in adapters[:i]:
                both = adapter.whole.keys() & other.whole.keys()
                if both:
                    raise FormatError(f"{adapter.folder} and {other.folder}: both replace {min(both)}")

    def open(self, mapped: MappedTensor) -> Weight:
        """Raises FormatError where a packed tensor's parts do not fit together."""
        name = mapped.source
        saved = [adapter for adapter in self._adapters if name in adapter.whole]
        base = SavedWeight(saved[-1], name) if saved else self._open_stored(mapped)
        updates = [adapter.update(name) for adapter in self._adapters if name in adapter.targets]
        return AdaptedWeight(base, updates) if updates else base

    def _open_stored(self, mapped: MappedTensor) -> Weight:
        name, shape = mapped.source, mapped.source_shape
        if self._packing is None or not self._is_packed(mapped):
            return StoredWeight(self.checkpoint, name)
        reader = _READERS[self._packing.method]
        return reader.open(self.checkpoint, self._packing, name, shape[0], shape[1])

    def place(self, mapped: MappedTensor) -> str:
        """Its file and name, for messages."""
        name = mapped.source
        if name not in self.checkpoint.tensors:
            name = name.removesuffix("weight") + "qweight"
        return self.checkpoint.tensors[name].place

    def _expected(self, mapped: MappedTensor) -> list[ExpectedTensor]:
        name, shape = mapped.source, mapped.source_shape
        if self._packing is None or not self._is_packed(mapped):
            return [ExpectedTensor(name, shape)]
        reader = _READERS[self._packing.method]
        return reader.tensors(self.checkpoint, self._packing, name, shape[0], shape[1])

    def _is_packed(self, mapped: MappedTensor) -> bool:
        return (
            self._packing is not None
            and len(mapped.source_shape) == 2
            and _READERS[self._packing.method].is_packed(self.checkpoint, mapped.source)
        )

    def _require_zeros(self, name: str) -> None:
        """GPTQ's writers give every packed layer a bias."""
        stored = self.checkpoint.tensors[name]
        if stored.dtype in FLOATS and stored.shape and not self.checkpoint.load(name).any():
            return
        raise UnsupportedError(
            f"{stored.place}: Qwen2-VL has no bias there: expected zeros, found {stored.dtype} values"
        )
