"""Matrices as bitsandbytes keeps them in 4 bits (nf4, fp4): indices into a table of 16 values, times a scale
that neighbouring values of a row-major matrix share.

| tensor | shape | |
|---|---|---|
| X.weight | [values / 2, 1] | two indices a byte, the first in the higher bits |
| X.weight.absmax | [blocks] | the scales; bytes where they are quantized in turn (double quantization) |
| X.weight.quant_map | [16] | the table |
| X.weight.nested_absmax | [blocks of scales] | |
| X.weight.nested_quant_map | [256] | a scale = nested_quant_map[byte] * nested_absmax + offset |
| X.weight.quant_state.bitsandbytes__nf4 | [bytes] | JSON: sizes of blocks, the offset |
"""

from __future__ import annotations

import json
import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.json_files import as_float32, quoted
from qwen2vl_q.checkpoint.tensors import Checkpoint, ExpectedTensor
from qwen2vl_q.convert.quantization import Packing
from qwen2vl_q.convert.weight import Weight

_BYTES, _FLOATS = ("U8",), ("F32",)
_STATES = tuple(f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_MAX_STATE_BYTES = 4096
_MAX_BLOCK = 1 << 16


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.absmax" in checkpoint.tensors


def packed_tensors(
    checkpoint: Checkpoint, packing: Packing, name: str, rows: int, columns: int
) -> list[ExpectedTensor]:
    """What stands for the weight `name` [rows, columns]. FormatError where its state is none."""
    state = _State(checkpoint, name, rows, columns)
    blocks = -(-rows * columns // state.block)
    expected = [
        ExpectedTensor(name, (-(-rows * columns // 2), 1), _BYTES),
        ExpectedTensor(f"{name}.absmax", (blocks,), _BYTES if state.nested_block else _FLOATS),
        ExpectedTensor(f"{name}.quant_map", (16,), _FLOATS),
        ExpectedTensor(state.name, checkpoint.tensors[state.name].shape, _BYTES),
    ]
    if state.nested_block:
        expected += [
            ExpectedTensor(f"{name}.nested_absmax", (-(-blocks // state.nested_block),), _FLOATS),
            ExpectedTensor(f"{name}.nested_quant_map", (256,), _FLOATS),
        ]
    return expected


class PackedWeight(Weight):
    """One such matrix; no type of GGUF has its table."""

    def __init__(self, checkpoint: Checkpoint, packing: Packing, name: str, rows: int, columns: int):
        self._packing = packing
        self._checkpoint, self._name, self._columns = checkpoint, name, columns
        self._state = _State(checkpoint, name, rows, columns)

    @property
    def origin(self) -> str:
        return str(self._packing)

    @property
    def hindrance(self) -> str:
        return "no type has its table"

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32 [stop - start, columns]."""
        begin, end, block = start * self._columns, stop * self._columns, self._state.block
        packed = self._checkpoint.load(self._name, begin // 2, -(-end // 2))[:, 0]
        indices = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[begin % 2 :][: end - begin]
        first = begin // block
        scales = np.repeat(self._scales[first : -(-end // block)], block)[begin - first * block :]
        values: NDArray[np.float32] = self._table[indices] * scales[: end - begin]
        return values.reshape(stop - start, self._columns)

    @cached_property
    def _table(self) -> NDArray[np.float32]:
        return self._read("quant_map")

    @cached_property
    def _scales(self) -> NDArray[np.float32]:
        """A block's scale [blocks]."""
        if not self._state.nested_block:
            return self._read("absmax")
        indices = self._checkpoint.load(f"{self._name}.absmax")
        scales = np.repeat(self._read("nested_absmax"), self._state.nested_block)[: len(indices)]
        nested: NDArray[np.float32] = self._read("nested_quant_map")[indices] * scales
        return nested + np.float32(self._state.offset)

    def _read(self, part: str) -> NDArray[np.float32]:
        name = f"{self._name}.{part}"
        return self._checkpoint.read(name, 0, self._checkpoint.tensors[name].shape[0])


class _State:
    """quant_state: the sizes of blocks and the scales' offset. nested_block is 0 where scales are floats."""

    def __init__(self, checkpoint: Checkpoint, name: str, rows: int, columns: int):
        names = [f"{name}.{state}" for state in _STATES]
        self.name = next((n for n in names if n in checkpoint.tensors), "")
        if not self.name:
            raise FormatError(f"{checkpoint.folder}: missing: {names[0]}")
        stored = checkpoint.tensors[self.name]
        self._place = stored.place
        if stored.dtype != "U8" or len(stored.shape) != 1 or not 0 < stored.shape[0] <= _MAX_STATE_BYTES:
            raise FormatError(f"{self._place}: expected 1 to {_MAX_STATE_BYTES} bytes, found {stored}")
        try:
            state = json.loads(checkpoint.load(self.name).tobytes())
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self._place}: not valid JSON: {error}") from error
        if not isinstance(state, dict):
            raise FormatError(f"{self._place}: expected a JSON object, found {type(state).__name__}")
        if state.get("shape") != [rows, columns]:
            raise self._error("shape", f"[{rows}, {columns}]", state.get("shape"))
        self.block = self._size(state, "blocksize")
        nested = f"{name}.nested_absmax" in checkpoint.tensors
        self.nested_block = self._size(state, "nested_blocksize") if nested else 0
        offset = as_float32(state.get("nested_offset")) if nested else 0.0
        if offset is None or not math.isfinite(offset):
            raise self._error("nested_offset", "a number", state.get("nested_offset"))
        self.offset = offset

    def _size(self, state: dict[str, object], key: str) -> int:
        value = state.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_BLOCK:
            raise self._error(key, f"from 1 to {_MAX_BLOCK}", value)
        return value

    def _error(self, key: str, expected: str, found: object) -> FormatError:
        return FormatError(f"{self._place}: {key}: expected {expected}, found {quoted(found)}")
