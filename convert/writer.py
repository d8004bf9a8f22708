"""Writes GGUF files tensor by tensor."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from qwen2vl_q.base.atomic_file import whole_or_not_at_all
from qwen2vl_q.convert.entries import ARCHITECTURE, AnyEntry, Entry, string

_ALIGNMENT = 32  # GGUF's default
_VERSION = 3


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
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return self.n_elements // values * size


Chunks = Callable[[OutputTensor], Iterator[NDArray[np.uint8]]]
Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Contents:
    """What a file will hold, in its order; general.architecture comes before the entries."""

    entries: Sequence[AnyEntry]
    tensors: Sequence[OutputTensor]
    architecture: str = ARCHITECTURE

    @cached_property
    def head(self) -> bytes:
        """All but the tensors' values."""
        entries = (Entry("general.architecture", self.architecture, GGUFValueType.STRING), *self.entries)
        head = [b"GGUF", struct.pack("<IQQ", _VERSION, len(self.tensors), len(entries))]
        head += [entry.encoded for entry in entries]
        offset = 0
        for tensor in self.tensors:
            dims = tensor.shape[::-1]
            type = GGMLQuantizationType[tensor.type]
            head.append(string(tensor.name))
            head.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset))
            offset += _padded(tensor.n_bytes)
        size = sum(map(len, head))
        return b"".join([*head, bytes(_padded(size) - size)])

    @property
    def n_bytes(self) -> int:
        return len(self.head) + sum(_padded(tensor.n_bytes) for tensor in self.tensors)


def write_gguf(
    out: Path,
    entries: Sequence[AnyEntry],
    tensors: Sequence[OutputTensor],
    chunks: Chunks,
    overwrite: bool,
    progress: Progress | None = None,
    architecture: str = ARCHITECTURE,
    check: Callable[[Path], None] | None = None,
) -> int:
    """`write_files` of one, whose size in bytes it returns."""
    contents = Contents(entries, tensors, architecture)
    write_files({out: contents}, chunks, overwrite, progress, check)
    return contents.n_bytes


def write_files(
    files: Mapping[Path, Contents],
    chunks: Chunks,
    overwrite: bool,
    progress: Progress | None = None,
    check: Callable[..., None] | None = None,
) -> None:
    """Writes files (of one folder) whole or not at all.

    `chunks` yields a tensor's bytes in order; `progress` is told after each how far all are. `check` is
    called before the first, with the paths of files that have all but the tensors' values. Raises
    FileExistsError where one exists and `overwrite` is false, OSError where the disk does not take them.
    """
    with ExitStack() as stack:
        parts = {out: stack.enter_context(whole_or_not_at_all(out, overwrite)) for out in files}
        first = next(iter(files))
        size, free = sum(file.n_bytes for file in files.values()), shutil.disk_usage(first.parent).free
        if size > free:
            raise OSError(f"{first}: the file needs {size} bytes, the disk has {free} left")
        for out, contents in files.items():
            with _named(out):
                parts[out].write_bytes(contents.head)
                os.truncate(parts[out], contents.n_bytes)
        if check is not None:
            check(*parts.values())
        total, done = sum(t.n_bytes for file in files.values() for t in file.tensors), 0
        for out, contents in files.items():
            with _named(out):
                for n_bytes in _written(parts[out], len(contents.head), contents.tensors, chunks):
                    done += n_bytes
                    if progress is not None:
                        progress(done, total)


@contextmanager
def _named(out: Path) -> Iterator[None]:
    """Writing does not say where it failed."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(out)
        raise


def _written(part: Path, start: int, tensors: Sequence[OutputTensor], chunks: Chunks) -> Iterator[int]:
    """Writes the tensors' bytes; after each chunk, its size."""
    with part.open("r+b") as stream:
        for tensor in tensors:
            stream.seek(start)
            for chunk in chunks(tensor):
                stream.write(chunk.data)
                yield chunk.nbytes
            if stream.tell() - start != tensor.n_bytes:
                raise ValueError(f"{tensor.name}: {stream.tell() - start} bytes for {tensor.n_bytes}")
            start += _padded(tensor.n_bytes)
        stream.flush()
        os.fsync(stream.fileno())


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
