"""Writes a GGUF file tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from qwen2vl_q._native import block_layout
from qwen2vl_q.base.atomic_file import whole_or_not_at_all
from qwen2vl_q.convert.metadata import ARCHITECTURE, Entry

_ALIGNMENT = 32  # GGUF's default


@dataclass(frozen=True)
class OutputTensor:
    name: str
    type: str  # "Q4_0", ...
    shape: tuple[int, ...]  # numpy order: rows last

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def n_bytes(self) -> int:
        values, size = block_layout(self.type)
        return self.n_elements // values * size


Chunks = Callable[[OutputTensor], Iterator[NDArray[np.uint8]]]


def write_gguf(
    out: Path,
    entries: Sequence[Entry],
    tensors: Sequence[OutputTensor],
    chunks: Chunks,
    overwrite: bool,
    progress: Callable[[int], None],
    architecture: str = ARCHITECTURE,
    check: Callable[[Path], None] | None = None,
) -> int:
    """Writes `out` whole or not at all and returns its size in bytes.

    `chunks` yields a tensor's bytes in order; `progress` is told how many were written after each. `check` is
    called before the first, with the path of a file that has all but the tensors' values. Raises
    FileExistsError where `out` exists and `overwrite` is false, OSError where the disk does not take it.
    """
    with whole_or_not_at_all(out, overwrite) as part:
        try:
            _write_head(part, architecture, entries, tensors)
            data_start = _padded(part.stat().st_size)
            size = data_start + sum(_padded(t.n_bytes) for t in tensors)
            free = shutil.disk_usage(part.parent).free
            if size > free:
                raise OSError(f"{out}: the file needs {size} bytes, the disk has {free} left")
            os.truncate(part, size)
            if check is not None:
                check(part)
            _write_data(part, data_start, tensors, chunks, progress)
        except OSError as error:
            if error.filename is None and error.errno is not None:  # writing does not say where it failed
                error.filename = str(out)
            raise
    return size


def _write_data(
    part: Path,
    start: int,
    tensors: Sequence[OutputTensor],
    chunks: Chunks,
    progress: Callable[[int], None],
) -> None:
    with part.open("r+b") as stream:
        for tensor in tensors:
            stream.seek(start)
            for chunk in chunks(tensor):
                stream.write(chunk.data)
                progress(chunk.nbytes)
            if stream.tell() - start != tensor.n_bytes:
                raise ValueError(f"{tensor.name}: {stream.tell() - start} bytes for {tensor.n_bytes}")
            start += _padded(tensor.n_bytes)
        stream.flush()
        os.fsync(stream.fileno())


def _write_head(
    part: Path, architecture: str, entries: Sequence[Entry], tensors: Sequence[OutputTensor]
) -> None:
    writer = GGUFWriter(part, architecture)
    try:
        for entry in entries:
            writer.add_key_value(entry.key, entry.value, entry.type)
        for tensor in tensors:
            # A dtype other than uint8 makes the shape count as elements, not bytes.
            writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),
                tensor.n_bytes,
                GGMLQuantizationType[tensor.type],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
