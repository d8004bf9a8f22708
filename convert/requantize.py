"""A model in GGUF becomes one file of other types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants
from gguf import GGUFValueType as T
from gguf.utility import size_label
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.tensor_map import MappedTensor, Role, name_in_model, role_of
from qwen2vl_q.convert.convert import require_range
from qwen2vl_q.convert.entries import AnyEntry, Entry
from qwen2vl_q.convert.gguf_source import GgufSource, StoredTensor
from qwen2vl_q.convert.recipe import FILE_TYPE_NUMBERS, Recipe, TextShape, type_for_row
from qwen2vl_q.convert.writer import OutputTensor, Progress, write_gguf
from qwen2vl_q.engine.model_parts import check_model_file

_CHUNK_VALUES = 1 << 22  # in memory at a time
_FLOATS = ("F32", "F16", "BF16")
_COMPUTED = _native.computed_types().split(", ")


@dataclass(frozen=True)
class RequantizedTensor:
    stored: StoredTensor
    mapped: MappedTensor  # as a checkpoint has it
    output: OutputTensor
    wanted: str  # the recipe's type; output.type is another where its blocks do not divide a row


@dataclass(frozen=True)
class GgufReport:
    path: Path
    n_bytes: int
    tensors: Sequence[RequantizedTensor]
    notes: Sequence[str]


def convert_gguf(
    model: Path,
    mmproj: Path | None,
    out: Path,
    recipe: Recipe,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    n_threads: int = 0,
) -> GgufReport:
    """Converts a file, or a language model's and its vision tower's (`mmproj`), to the file `out`.

    Vocabulary, template and all other keys stay as they are; a tensor whose type stays keeps its bytes.
    Errors as of `convert_checkpoint` and `GgufSource`; UnsupportedError for a type that gguf cannot read.
    """
    source = GgufSource(model, mmproj)
    swapped = _native.has_swapped_feed_forward(source.tower)
    shape = TextShape.of({stored.output.name: stored.output.shape for stored in source.tensors})
    planned = [(stored, _plan(stored, recipe, shape, swapped)) for stored in source.tensors]
    tensors = [tensor for _, tensor in planned if tensor is not None]
    left_out = [stored.output.name for stored, tensor in planned if tensor is None]
    recipe.check([tensor.output for tensor in tensors])
    by_name = {tensor.output.name: tensor for tensor in tensors}
    size = write_gguf(
        out,
        _entries(source, tensors, recipe, name),
        [tensor.output for tensor in tensors],
        lambda output: _chunks(by_name[output.name], recipe, n_threads),
        overwrite,
        progress,
        check=lambda part: check_model_file(str(part)),
    )
    notes = _notes(tensors, left_out) + recipe.notes([tensor.output for tensor in tensors])
    return GgufReport(out, size, tensors, notes)


def _plan(stored: StoredTensor, recipe: Recipe, text: TextShape, swapped: bool) -> RequantizedTensor | None:
    """None for what the model does not read. `swapped`: fc1 and fc2 stand under each other's name."""
    name, shape = name_in_model(stored.output.name, swapped), stored.output.shape
    role = role_of(name)
    if role is None:
        return None
    wanted = recipe.wanted(role, name, text)
    type = type_for_row(wanted, shape[-1])
    # The checkpoint has both frames' filters in one tensor.
    source_shape = (*shape[:2], 2, *shape[2:]) if role is Role.PATCH else shape
    mapped = MappedTensor(name, source_shape, (name,), role)
    return RequantizedTensor(stored, mapped, OutputTensor(name, type, shape), wanted)


def _entries(
    source: GgufSource, tensors: Sequence[RequantizedTensor], recipe: Recipe, name: str | None
) -> list[AnyEntry]:
    n = sum(tensor.output.n_elements for tensor in tensors)
    (ffn,) = (t.output.shape[0] for t in tensors if t.output.name == "v.blk.0.ffn_up.weight")
    changed = {
        "general.file_type": (FILE_TYPE_NUMBERS[recipe.type], T.UINT32),
        "general.size_label": (size_label(n, n, 0, 0), T.STRING),
        "clip.vision.feed_forward_length": (ffn, T.UINT32),  # llama.cpp's own converters have it wrong
    }
    if name is not None:
        changed["general.name"] = name.encode(errors="replace").decode(), T.STRING
    return [
        Entry(entry.key, *changed[entry.key]) if entry.key in changed else entry for entry in source.entries
    ]


def _chunks(tensor: RequantizedTensor, recipe: Recipe, n_threads: int) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes, a slice of rows at a time."""
    stored, output = tensor.stored, tensor.output
    if stored.output.type == output.type:
        yield from stored.chunks()
        return
    row = output.shape[-1]
    row_bytes = replace(stored.output, shape=(row,)).n_bytes
    step = max(1, _CHUNK_VALUES // row) * row_bytes
    place = f"{printable(str(stored.path), 1000)}: tensor '{printable(stored.output.name)}'"
    for data in stored.chunks(step):
        values = _dequantized(data.reshape(-1, row_bytes), stored.output.type, place)
        require_range(values, output.type, place)
        yield _native.quantize(values, output.type, n_threads, recipe.weights(output))


def _dequantized(rows: NDArray[np.uint8], type: str, place: str) -> NDArray[np.float32]:
    """Types that the engine does not compute (IQ3_S ...) are read by gguf, slowly."""
    if type in _COMPUTED:
        return _native.dequantize(rows, type)
    try:
        return quants.dequantize(rows, GGMLQuantizationType[type]).astype(np.float32, copy=False)
    except NotImplementedError:
        raise UnsupportedError(f"{place}: stored as {type}, which cannot be read") from None


def _notes(tensors: Sequence[RequantizedTensor], left_out: Sequence[str]) -> list[str]:
    again = Counter(
        (t.stored.output.type, t.output.type)
        for t in tensors
        if t.stored.output.type not in _FLOATS and t.stored.output.type != t.output.type
    )
    notes = [
        f"{count} tensors were {before} and are {after} now: what {before} has lost stays lost"
        for (before, after), count in again.items()
    ]
    if left_out:
        shown = ", ".join(printable(name) for name in left_out[:3])
        notes.append(f"{len(left_out)} tensors that the model does not read are left out: {shown}")
    return notes
