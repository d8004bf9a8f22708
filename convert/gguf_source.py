"""A model in GGUF: one file, in parts or not, or a language model's and its vision tower's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q._native import GgufFile
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.convert.entries import StoredEntry
from qwen2vl_q.convert.writer import OutputTensor

_CHUNK_BYTES = 1 << 23
# Keys of the file on disk, which a copy has anew.
_OF_THE_FILE = ("general.architecture", "general.alignment", "split.")
_AFTER_VISION = "general.quantization_version"  # where our own files have the tower's keys: before it


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies; `output` describes a copy."""

    file: GgufFile
    path: Path
    output: OutputTensor

    def chunks(self, n_bytes: int = _CHUNK_BYTES) -> Iterator[NDArray[np.uint8]]:
        """Its bytes, so many at a time."""
        for begin in range(0, self.output.n_bytes, n_bytes):
            yield self.file.raw(self.output.name, begin, min(n_bytes, self.output.n_bytes - begin))


class GgufSource:
    """The keys and tensors of both halves, those of the language model first."""

    def __init__(self, model: Path, mmproj: Path | None = None):
        """Raises what loading the model would, but for types that are not computed: OSError, FormatError,
        UnsupportedError; FormatError also where the vision tower is missing or there are two."""
        self.path = model
        language = GgufFile(model)
        _native.require_language_model(language)
        whole = _native.has_vision_tower(language)
        if whole and mmproj is not None:
            raise FormatError(f"{printable(str(model), 1000)}: it has a vision tower of its own")
        if not whole and mmproj is None:
            raise FormatError(f"{printable(str(model), 1000)}: it has no vision tower, and none was given")
        self.tower = language if mmproj is None else GgufFile(mmproj)
        _native.read_config(str(model), None if mmproj is None else str(mmproj), any_type=True)
        self.tensors = _tensors(language, model)
        self.language_entries = _entries(language, vision=False)
        self.vision_entries = _entries(self.tower, vision=True)
        if mmproj is not None:
            self.tensors += _tensors(self.tower, mmproj)

    @property
    def entries(self) -> list[StoredEntry]:
        """Of one file with both halves."""
        keys = [entry.key for entry in self.language_entries]
        at = keys.index(_AFTER_VISION) if _AFTER_VISION in keys else len(keys)
        return [*self.language_entries[:at], *self.vision_entries, *self.language_entries[at:]]

    def by_name(self) -> Mapping[str, StoredTensor]:
        return {tensor.output.name: tensor for tensor in self.tensors}


def _entries(file: GgufFile, vision: bool) -> Sequence[StoredEntry]:
    return [
        StoredEntry(key, encoded)
        for key, encoded in file.entries
        if key.startswith("clip.") == vision and not key.startswith(_OF_THE_FILE)
    ]


def _tensors(file: GgufFile, path: Path) -> list[StoredTensor]:
    return [StoredTensor(file, path, OutputTensor(t.name, t.type, t.shape)) for t in file.tensors]
