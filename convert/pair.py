"""One file with both halves, and the pair of files that llama.cpp has instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from gguf import GGUFValueType as T

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.convert.entries import AnyEntry, Entry
from qwen2vl_q.convert.gguf_source import GgufSource, StoredTensor
from qwen2vl_q.convert.recipe import FILE_TYPE_NUMBERS
from qwen2vl_q.convert.writer import Contents, Progress, write_files
from qwen2vl_q.engine.model_parts import check_model_file

# llama.cpp's language models refuse tensors that they do not know; towers let them be.
_LANGUAGE = ("token_embd.", "blk.", "output_norm.", "output.")
_OF_BOTH = ("general.name", "general.quantization_version")


def pair_paths(prefix: Path) -> tuple[Path, Path]:
    """The language model's file and the vision tower's: PREFIX.gguf, PREFIX-mmproj.gguf."""
    return prefix.with_name(f"{prefix.name}.gguf"), prefix.with_name(f"{prefix.name}-mmproj.gguf")


def split_model(
    model: Path, prefix: Path, overwrite: bool = False, progress: Progress | None = None
) -> Sequence[tuple[Path, int]]:
    """Writes the halves of `model` as `pair_paths(prefix)`, both or none; returns each path and its size.

    Tensors keep their bytes, keys theirs. Raises what `GgufSource` raises, FileExistsError where one is there
    and `overwrite` is false, ValueError where it would be `model` itself, OSError for the disk's errors.
    """
    source = GgufSource(model)
    language, tower = pair_paths(prefix)
    halves: tuple[list[StoredTensor], list[StoredTensor]] = [], []
    for tensor in source.tensors:
        halves[not tensor.output.name.startswith(_LANGUAGE)].append(tensor)
    files = {
        language: Contents(source.language_entries, [t.output for t in halves[0]]),
        tower: Contents(_tower_entries(source, halves[1]), [t.output for t in halves[1]], "clip"),
    }

    def check(language: Path, tower: Path) -> None:
        check_model_file(str(language), str(tower))

    return _write(source, files, overwrite, progress, check, [model])


def merge_models(
    model: Path, mmproj: Path, out: Path, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Writes both halves into the file `out` and returns its size. Of what `split_model` made of a file that
    `convert` wrote, it is that file again, byte for byte. Errors as of `split_model`."""
    source = GgufSource(model, mmproj)
    files = {out: Contents(source.entries, [t.output for t in source.tensors])}

    def check(whole: Path) -> None:
        check_model_file(str(whole))

    return _write(source, files, overwrite, progress, check, [model, mmproj])[0][1]


def _write(
    source: GgufSource,
    files: dict[Path, Contents],
    overwrite: bool,
    progress: Progress | None,
    check: Callable[..., None],
    inputs: Sequence[Path],
) -> Sequence[tuple[Path, int]]:
    for out in files:
        if out.exists() and any(out.samefile(given) for given in inputs):
            raise ValueError(f"{printable(str(out), 1000)}: the file that is read would be overwritten")
    tensors = source.by_name()
    write_files(files, lambda output: tensors[output.name].chunks(), overwrite, progress, check)
    return [(out, contents.n_bytes) for out, contents in files.items()]


def _tower_entries(source: GgufSource, tensors: Sequence[StoredTensor]) -> list[AnyEntry]:
    """What llama.cpp's programs look for in a tower's file."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.output.type.lower()] += tensor.output.n_bytes
    type = sizes.most_common(1)[0][0]
    if not any(entry.key == "clip.has_vision_encoder" for entry in source.vision_entries):
        raise FormatError(f"{printable(str(source.path), 1000)}: key 'clip.has_vision_encoder' is missing")
    entries: list[AnyEntry] = [Entry("general.type", "mmproj", T.STRING)]
    entries += [entry for entry in source.language_entries if entry.key in _OF_BOTH]
    if type in FILE_TYPE_NUMBERS:
        entries.append(Entry("general.file_type", FILE_TYPE_NUMBERS[type], T.UINT32))
    return [*entries, *source.vision_entries]
