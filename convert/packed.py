"""Matrices as GPTQ and AWQ pack them: integers q of a few bits in 32-bit words, and for every row and group
of columns a scale and a zero point. A weight is scale * (q - zero).

| tensor | GPTQ | AWQ (gemm) |
|---|---|---|
| qweight | [columns / n, rows], n = 32 / bits: a word has n columns of a row | [columns, rows / 8]: 8 rows |
| qzeros | [groups, rows / n] | [groups, rows / 8] |
| scales | [groups, rows] | [groups, rows] |
| g_idx | [columns]: each column's group; may be missing where the groups lie in order | |

The first value of a word is in its lowest bits; AWQ's eight stand in the order of `_AWQ_ORDER`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.checkpoint.tensors import FLOATS, Checkpoint, ExpectedTensor
from qwen2vl_q.convert.integer_blocks import BLOCK, integer_blocks, types_that_hold
from qwen2vl_q.convert.quantization import Packing
from qwen2vl_q.convert.weight import Weight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WORDS = ("I32",)

Words = NDArray[np.uint32]


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the checkpoint has the weight `name` ("....weight") as packed words."""
    return f"{_module(name)}.qweight" in checkpoint.tensors


def packed_tensors(
    checkpoint: Checkpoint, packing: Packing, name: str, rows: int, columns: int
) -> list[ExpectedTensor]:
    """What stands for the weight `name` [rows, columns]. FormatError where its sizes cannot be packed."""
    per_word = 32 // packing.bits
    group = packing.group_size or columns
    groups = -(-columns // group)
    packed_side = columns if packing.method == "GPTQ" else rows
    for what, size, divisor in (
        ("packed values", packed_side, per_word),
        ("rows' zero points", rows, per_word),
        *([("columns", columns, group)] if packing.method == "AWQ" else []),
    ):
        if size % divisor:
            raise FormatError(
                f"{name} [{rows}, {columns}] as {packing}: {what}: expected a multiple of {divisor}, "
                f"found {size}"
            )
    module = _module(name)
    qweight = (columns // per_word, rows) if packing.method == "GPTQ" else (columns, rows // per_word)
    return [
        ExpectedTensor(f"{module}.qweight", qweight, _WORDS),
        ExpectedTensor(f"{module}.qzeros", (groups, rows // per_word), _WORDS),
        ExpectedTensor(f"{module}.scales", (groups, rows), FLOATS),
        *(
            [ExpectedTensor(f"{module}.g_idx", (columns,), _WORDS, optional=True)]
            if packing.method == "GPTQ"
            else []
        ),
    ]


class PackedWeight(Weight):
    """One packed matrix [rows, columns]; its words are read when the first integers are wanted."""

    def __init__(self, checkpoint: Checkpoint, packing: Packing, name: str, rows: int, columns: int):
        """Raises FormatError where a column's group is none or a scale is not finite."""
        self._checkpoint, self._packing, self._module = checkpoint, packing, _module(name)
        self._columns = columns
        scales = f"{self._module}.scales"
        self._scales = checkpoint.read(scales, 0, checkpoint.tensors[scales].shape[0]).T  # [rows, groups]
        if not np.isfinite(self._scales).all():
            raise FormatError(f"{checkpoint.tensors[scales].place} holds values that are not finite")
        mask = 2**packing.bits - 1
        zeros = _unpacked(checkpoint.load(f"{self._module}.qzeros"), packing)
        # Within its bits, as the packers' own kernels: a stored 15 is the zero point 0.
        self._zeros = ((zeros + packing.zero_offset) & mask).T.astype(np.int16)  # [rows, groups]
        self._group_of = self._groups()

    @property
    def origin(self) -> str:
        return str(self._packing)

    @property
    def kept(self) -> tuple[str, ...]:
        return () if self.hindrance else types_that_hold(*self._range)

    @cached_property
    def hindrance(self) -> str:
        if self._columns % BLOCK:
            return f"blocks of {BLOCK} do not divide a row"
        blocks = self._group_of.reshape(-1, BLOCK)
        if (blocks != blocks[:, :1]).any():  # act-order
            return "a block's columns are of several groups"
        return "" if types_that_hold(*self._range) else "integers of more than 8 bits"

    @property
    def _range(self) -> tuple[int, int]:
        """Of q - zero, as far as the zero points tell."""
        highest = 2**self._packing.bits - 1 - int(self._zeros.min())
        return -int(self._zeros.max()), highest

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop as float32 [stop - start, columns]."""
        return self._scales[start:stop, self._group_of] * self._integers(start, stop)

    def blocks(self, start: int, stop: int, type: str) -> NDArray[np.uint8]:
        """Rows start..stop in blocks of a type of `kept`: [stop - start, row_bytes]."""
        scales = self._scales[start:stop, self._group_of[::BLOCK]]
        return integer_blocks(self._integers(start, stop), scales, type)

    def _integers(self, start: int, stop: int) -> NDArray[np.int16]:
        """q - zero of rows start..stop."""
        if self._packing.method == "GPTQ":
            q = _unpacked(np.ascontiguousarray(self._words[:, start:stop].T), self._packing)
        else:
            first, last = start // 8, -(-stop // 8)
            q = _unpacked(self._words[:, first:last], self._packing).T[start - first * 8 : stop - first * 8]
        integers: NDArray[np.int16] = q - self._zeros[start:stop, self._group_of]
        return integers

    @cached_property
    def _words(self) -> Words:
        return self._checkpoint.load(f"{self._module}.qweight")

    def _groups(self) -> NDArray[np.int64]:
        name = f"{self._module}.g_idx"
        groups = self._scales.shape[1]
        if name not in self._checkpoint.tensors:
            return np.arange(self._columns) // (self._packing.group_size or self._columns)
        group_of = self._checkpoint.load(name).astype(np.int64)
        if group_of.max() >= groups:
            column = int(group_of.argmax())
            found = int(group_of[column].astype(np.int32))
            stored = self._checkpoint.tensors[name]
            raise FormatError(
                f"{stored.place}: expected groups from 0 to {groups - 1}, found {found} for column {column}"
            )
        return group_of


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _unpacked(words: Words, packing: Packing) -> NDArray[Any]:
    """[n, m] -> [n, m * 32 / bits]"""
    bits = packing.bits
    # The bytes of a word, lowest first, as they are for 8 bits; two values each for 4.
    values = words.astype("<u4").view(np.uint8)
    if bits == 4:
        values = np.stack([values & 15, values >> 4], axis=-1).reshape(len(words), -1)
    if packing.method == "AWQ":
        places = np.argsort(_AWQ_ORDER)  # a row's place in its word
        values = values.reshape(len(words), -1, 8)[..., places].reshape(len(words), -1)
    return values
