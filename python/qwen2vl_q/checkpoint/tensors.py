"""A checkpoint's safetensors files, read lazily: one range of rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.json_files import quoted, read_json
from qwen2vl_q.base.printable import printable

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
FLOATS = ("F32", "F16", "BF16")
# Little-endian storage; numpy has no bfloat16, so its bits are read and widened here. I32 are packed words,
# U8 packed bytes.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
}
# Tables that old versions of transformers saved and every runtime computes.
_DERIVED = (".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq")
_PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),  # of a model without its head
)
_SHOWN = 3  # of the tensors that do not fit
# What safetensors lets pass where an axis is 0, and numpy refuses: no model has as many.
_MAX_AXES, _MAX_VALUES = 8, 1 << 48


@dataclass(frozen=True)
class StoredTensor:
    file: Path
    name: str  # as the file has it
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def place(self) -> str:
        """Its file and name, for messages."""
        return f"{self.file}: tensor '{printable(self.name)}'"

    def __str__(self) -> str:
        return f"{printable(self.name, 80)} {printable(list(self.shape), 40)}"


class ExpectedTensor(NamedTuple):
    name: str  # canonical
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False


def canonical_name(name: str) -> str:
    """The hub's style (`visual.*`, `model.*`) of a name in that style or in transformers' newer one."""
    name = name.removeprefix("vlm.")  # of ColQwen2
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


class Checkpoint:
    """The tensors of a folder by canonical name. Opening it reads the headers only."""

    def __init__(
        self,
        folder: Path,
        files: Sequence[Path] | None = None,
        canonical: Callable[[str], str] = canonical_name,
    ):
        """Of the folder's shards, or of `files`. Raises FormatError where one is missing or damaged, or a
        name occurs twice."""
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        for file in _shard_files(folder) if files is None else files:
            for tensor in _read_header(file):
                name = canonical(tensor.name)
                if name in self.tensors:
                    other = self.tensors[name]
                    raise FormatError(
                        f"{tensor.place} is also in {other.file.name} as '{printable(other.name)}'"
                    )
                self.tensors[name] = tensor

    def check(self, expected: Iterable[ExpectedTensor], ignored: Iterable[str]) -> None:
        """Raises one FormatError for all missing, unexpected, misshapen and unreadable tensors; it names the
        first few."""
        wanted = {tensor.name: tensor for tensor in expected}
        problems = [
            f"missing: {tensor.name} {list(tensor.shape)}"
            for tensor in wanted.values()
            if tensor.name not in self.tensors and not tensor.optional
        ]
        skip = set(ignored)
        for name, stored in self.tensors.items():
            if name not in wanted:
                if name not in skip and not name.endswith(_DERIVED):
                    problems.append(f"unexpected: {stored} in {stored.file.name}")
            elif stored.shape != wanted[name].shape:
                problems.append(f"misshapen: {stored}, expected {list(wanted[name].shape)}")
            elif stored.dtype not in wanted[name].dtypes:
                *most, last = wanted[name].dtypes
                names = f"{', '.join(most)} or {last}" if most else last
                problems.append(f"type: {stored} is {stored.dtype}, expected {names}")
        if problems:
            listing = "; ".join(problems[:_SHOWN])
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise FormatError(
                f"{self.folder}: {len(problems)} tensors do not fit config.json: {listing}{more}"
            )

    def read(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of a tensor's first axis, as float32 [stop - start, ...]."""
        values = self.load(name, start, stop)
        if self.tensors[name].dtype == "BF16":
            wide = values.astype(np.uint32)
            wide <<= 16
            values = wide.view(np.float32)
        return np.asarray(values, np.float32)

    def load(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows start..stop of a tensor, or the whole, as it is stored."""
        tensor = self.tensors[name]
        stop = tensor.shape[0] if stop is None else stop
        dtype = _DTYPES[tensor.dtype]
        row = math.prod(tensor.shape[1:])
        count = (stop - start) * row
        # Plain reads, not a mapping: pages of a mapping would count as this process's memory.
        values: NDArray[Any] = np.fromfile(
            tensor.file, dtype, count, offset=tensor.offset + start * row * dtype.itemsize
        )
        if values.size != count:
            raise FormatError(f"{tensor.place}: the file ends within it")
        return values.reshape(stop - start, *tensor.shape[1:])


def _shard_files(folder: Path) -> list[Path]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():  # first, as transformers: an index beside it may be an older save's
        return [single]
    if not index.is_file():
        raise FormatError(f"{folder}: neither {_SINGLE} nor {_INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: expected an object 'weight_map' from tensors to files")
    for name in weight_map.values():
        if not _is_shard_name(name):
            raise FormatError(
                f"{index}: expected the name of a safetensors file in the same folder, found {quoted(name)}"
            )
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"{index}: {len(missing)} of {len(names)} files are missing: {printable(', '.join(missing))}"
        )
    return [folder / name for name in names]


def _is_shard_name(name: object) -> bool:
    """A plain name in the same folder: an index is data from the net and must not lead elsewhere."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and len(name) <= 255
        and name.isprintable()
        and not any(c in name for c in "/\\:")
    )


def _read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file. safetensors itself checks lengths, types, overlaps and the file's size."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise FormatError(f"{file}: not a sound safetensors file: {printable(str(error))}") from error
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    unprintable = [name for name in header if not name.isprintable()]
    if unprintable:  # names end up in messages: no terminal codes there
        raise FormatError(f"{file}: tensor name '{printable(unprintable[0])}' is not printable")
    tensors = [
        StoredTensor(
            file, name, info["dtype"], tuple(info["shape"]), 8 + header_bytes + info["data_offsets"][0]
        )
        for name, info in header.items()
        if name != "__metadata__"
    ]
    for tensor in tensors:
        if len(tensor.shape) > _MAX_AXES or math.prod(n or 1 for n in tensor.shape) > _MAX_VALUES:
            raise FormatError(
                f"{tensor.place}: expected up to {_MAX_AXES} axes and 2^48 values, "
                f"found {printable(list(tensor.shape), 40)}"
            )
    return tensors
