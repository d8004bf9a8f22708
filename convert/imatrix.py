"""llama.cpp's importance matrices: the mean square of what each column of a matrix is multiplied with."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q._native import GgufFile
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable

_MAX_BYTES = 1 << 28  # of the older form; a 72B model's has 30 MB
_MAX_NAME = 256
_SUMS, _COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    path: Path
    columns: Mapping[str, NDArray[np.float32]] = field(repr=False)  # by tensor: finite, 0 or more

    def weights(self, tensor: str, n_columns: int) -> NDArray[np.float32] | None:
        """Of a tensor's columns, None where the file does not have it. FormatError for another number."""
        found = self.columns.get(tensor)
        if found is not None and found.size != n_columns:
            raise FormatError(
                f"{printable(str(self.path), 1000)}: '{printable(tensor)}': expected {n_columns} columns, "
                f"found {found.size}"
            )
        return found


def read_imatrix(path: Path) -> Imatrix:
    """In GGUF, or in the older form of its own. Raises OSError, and FormatError for what is neither."""
    with path.open("rb") as stream:
        is_gguf = stream.read(4) == b"GGUF"
    columns = _read_gguf(path) if is_gguf else _Older(path).columns
    if not columns:
        raise FormatError(f"{printable(str(path), 1000)}: it has no tensor's importance")
    for name, values in columns.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            place = f"{printable(str(path), 1000)}: '{printable(name)}'"
            raise FormatError(f"{place}: expected finite numbers of 0 or more")
    return Imatrix(path, columns)


def _read_gguf(path: Path) -> dict[str, NDArray[np.float32]]:
    """Per tensor, sums of squares in_sum2 [matrices, columns] and how many counts [matrices, 1]."""
    file = GgufFile(path)
    stored = {tensor.name: tensor for tensor in file.tensors}
    columns = {}
    for name, tensor in stored.items():
        if not name.endswith(_SUMS):
            continue
        base, place = name.removesuffix(_SUMS), f"{printable(str(path), 1000)}: '{printable(name)}'"
        counts = stored.get(base + _COUNTS)
        if counts is None:
            raise FormatError(f"{place}: '{printable(base + _COUNTS)}' is missing")
        if tensor.type != "F32" or counts.type != "F32":
            raise FormatError(f"{place}: expected F32, found {tensor.type} and {counts.type}")
        if int(np.prod(counts.shape)) != 1 or int(np.prod(tensor.shape[:-1])) != 1:
            raise FormatError(f"{place}: expected one matrix, found {tensor.shape} and counts {counts.shape}")
        columns[base] = _mean(file.read(name).reshape(-1), float(file.read(base + _COUNTS).reshape(-1)[0]))
    return columns


def _mean(sums: NDArray[np.float32], count: float) -> NDArray[np.float32]:
    return sums / np.float32(count) if count > 0 else sums


class _Older:
    """Little-endian: int32 entries; of each, int32 length and name, int32 calls, int32 values, float32 sums
    over the calls. What follows (chunks, the data's name) is not needed."""

    def __init__(self, path: Path) -> None:
        self._place = printable(str(path), 1000)
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise FormatError(f"{self._place}: expected at most {_MAX_BYTES} bytes, found {size}")
        self._data, self._at = path.read_bytes(), 0
        self.columns: dict[str, NDArray[np.float32]] = {}
        for _ in range(self._number("entries", len(self._data) // 12)):
            length = self._number("bytes of a name", _MAX_NAME)
            name = self._take(length).decode(errors="replace")
            calls = self._number("calls", 1 << 31)
            n = self._number("values", len(self._data) // 4)
            self.columns[name] = _mean(np.frombuffer(self._take(4 * n), "<f4").astype(np.float32), calls)

    def _number(self, what: str, most: int) -> int:
        (value,) = struct.unpack("<i", self._take(4))
        if not 0 <= value <= most:
            raise FormatError(
                f"{self._place}: not an importance matrix: expected a number of {what} of 0 to {most}, found "
                f"{value} at byte {self._at - 4}"
            )
        return int(value)

    def _take(self, n: int) -> bytes:
        if self._at + n > len(self._data):
            raise FormatError(
                f"{self._place}: not an importance matrix: it ends at byte {len(self._data)}, expected {n} "
                f"more at {self._at}"
            )
        self._at += n
        return self._data[self._at - n : self._at]
