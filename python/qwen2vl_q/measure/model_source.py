"""What can be measured: GGUF files, pairs of them, and checkpoints, as files that lose nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from qwen2vl_q import _native
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.tensors import Checkpoint
from qwen2vl_q.convert import FILE_TYPES, FileType, Recipe, convert_checkpoint, convert_gguf
from qwen2vl_q.convert.writer import Progress
from qwen2vl_q.engine.tower_file import TowerFile

TYPES: Sequence[str] = FILE_TYPES  # that a file can be written in
_LOSSLESS: dict[str, FileType] = {"BF16": "bf16", "F16": "f16"}


@dataclass(frozen=True)
class ModelFile:
    path: str
    mmproj: str | None = None  # None: the vision tower is in the model's own file, or nowhere

    @classmethod
    def of(cls, path: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = None) -> ModelFile:
        """With the vision tower's file that is given or lies beside it. Errors as of `TowerFile.find`."""
        path = os.fspath(path)
        return cls(path, TowerFile.of(path, mmproj).path)

    def open(self) -> list[_native.GgufFile]:
        """The language model's file first."""
        return [_native.GgufFile(path) for path in (self.path, self.mmproj) if path is not None]


@dataclass(frozen=True)
class CheckpointFolder:
    path: str

    @property
    def lossless_type(self) -> FileType:
        """The smallest type that holds every value."""
        dtypes = {tensor.dtype for tensor in Checkpoint(Path(self.path)).tensors.values()}
        return _LOSSLESS.get(next(iter(dtypes)), "f32") if len(dtypes) == 1 else "f32"


Source = ModelFile | CheckpointFolder


def source_of(path: str | os.PathLike[str], mmproj: str | os.PathLike[str] | None = None) -> Source:
    """Errors as of `ModelFile.of`; ValueError for a checkpoint with an mmproj."""
    if not (Path(path) / "config.json").is_file():
        return ModelFile.of(path, mmproj)
    if mmproj is not None:
        raise ValueError(
            f"{printable(os.fspath(path), 1000)}: a checkpoint has its vision tower, found an mmproj"
        )
    return CheckpointFolder(os.fspath(path))


def write_as(source: Source, type: str, out: Path, progress: Progress | None = None) -> None:
    """The file `out` of one of TYPES, whole or not at all. Errors as of `convert_checkpoint` and
    `convert_gguf`."""
    recipe = Recipe(cast(FileType, type))
    if isinstance(source, CheckpointFolder):
        convert_checkpoint(Path(source.path), out, recipe, progress=progress)
    else:
        mmproj = None if source.mmproj is None else Path(source.mmproj)
        convert_gguf(Path(source.path), mmproj, out, recipe, progress=progress)


@contextmanager
def opened(source: Source, progress: Progress | None = None) -> Iterator[ModelFile]:
    """A file as it is; of a checkpoint a temporary one, of `lossless_type`, which is gone afterwards.
    `progress` is told its bytes. Errors as of `convert_checkpoint`."""
    if isinstance(source, ModelFile):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="qwen2vl-q-") as folder:
        out = Path(folder) / "reference.gguf"
        write_as(source, source.lossless_type, out, progress)
        yield ModelFile(str(out))
