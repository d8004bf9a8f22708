"""A Hugging Face checkpoint becomes one GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q._native import quantize
from qwen2vl_q.base.atomic_file import part_of
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.convert.checkpoint import Checkpoint
from qwen2vl_q.convert.config import read_config
from qwen2vl_q.convert.files import model_name
from qwen2vl_q.convert.metadata import metadata
from qwen2vl_q.convert.recipe import Recipe, TextShape, type_for_row
from qwen2vl_q.convert.tensor_map import MappedTensor, Role, map_tensors
from qwen2vl_q.convert.tokenizer_files import read_tokenizer
from qwen2vl_q.convert.writer import OutputTensor, write_gguf
from qwen2vl_q.engine.model_parts import check_model_file

_CHUNK_VALUES = 1 << 22  # values in memory at a time (16 MiB as float32), however large the tensor
_F16_MAX = 65504.0  # F16 values, and the F16 scales of the block types, end here

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of the file and where it comes from: part `part` of the checkpoint's tensor."""

    mapped: MappedTensor
    part: int
    output: OutputTensor
    wanted: str  # the recipe's type; output.type is another where its blocks do not divide a row


@dataclass(frozen=True)
class Report:
    path: Path
    n_bytes: int
    tensors: Sequence[ConvertedTensor]
    notes: Sequence[str]


def convert_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    n_threads: int = 0,
) -> Report:
    """Converts the checkpoint in the folder `source` to the file `out`, which appears whole or not at all.

    What it becomes has to pass the runtime's own checks, before the tensors are quantized, on `n_threads` (0:
    one for each core). Raises FormatError or UnsupportedError for a checkpoint that is damaged or not a
    Qwen2-VL, and what `Recipe.check` raises, FileExistsError where `out` exists and `overwrite` is false,
    OSError for the disk's errors.
    """
    notes = _leftover_notes(out)
    config = read_config(source)
    mapped = map_tensors(config)
    checkpoint = Checkpoint(source)
    ignored = ["lm_head.weight"] if config.tie_word_embeddings else []
    checkpoint.check(mapped, ignored)
    tokenizer = read_tokenizer(source, config)
    tensors = _plan(mapped, recipe)
    text = (name or model_name(source)).encode(errors="replace").decode()  # a path may be no Unicode
    entries = metadata(text, config, recipe, tokenizer, sum(t.output.n_elements for t in tensors))
    by_name = {tensor.output.name: tensor for tensor in tensors}
    total = sum(tensor.output.n_bytes for tensor in tensors)
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    size = write_gguf(
        out,
        entries,
        [tensor.output for tensor in tensors],
        lambda output: _chunks(checkpoint, by_name[output.name], recipe, n_threads),
        overwrite,
        advance,
        check=lambda part: _check(part, config.path),
    )
    notes += [
        f"{name} is not written: config.json ties the head to the embeddings"
        for name in ignored
        if name in checkpoint.tensors
    ]
    notes += recipe.notes([tensor.output for tensor in tensors])
    if "default" not in tokenizer.chat_templates:
        notes.append("the checkpoint has no chat template: Qwen2-VL's own is used")
    return Report(out, size, tensors, notes)


def _leftover_notes(out: Path) -> list[str]:
    part = part_of(out)
    if not part.exists():
        return []
    name, size = printable(part.name), part.stat().st_size
    return [f"{name}, which a conversion that was killed had left, is gone: {size:,} bytes"]


def _check(part: Path, config_path: Path) -> None:
    """What the other files bring has been checked when they were read; the rest is config.json's."""
    try:
        check_model_file(str(part))
    except (FormatError, UnsupportedError) as error:
        reason = str(error).removeprefix(f"{part}: ")
        raise type(error)(f"{config_path}: the runtime refuses what it describes: {reason}") from None


def _plan(mapped: Sequence[MappedTensor], recipe: Recipe) -> list[ConvertedTensor]:
    shape = TextShape.of({target: m.target_shape for m in mapped for target in m.targets})
    tensors = []
    for m in mapped:
        for part, target in enumerate(m.targets):
            wanted = recipe.wanted(m.role, target, shape)
            type = type_for_row(wanted, m.target_shape[-1])
            tensors.append(ConvertedTensor(m, part, OutputTensor(target, type, m.target_shape), wanted))
    recipe.check([tensor.output for tensor in tensors])
    return tensors


def _chunks(
    checkpoint: Checkpoint, tensor: ConvertedTensor, recipe: Recipe, n_threads: int
) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes, a slice of rows at a time."""
    mapped, shape = tensor.mapped, tensor.output.shape
    stored = checkpoint.tensors[mapped.source]
    first = tensor.part * shape[0] if mapped.split_axis == 0 else 0
    step = max(1, _CHUNK_VALUES // math.prod(mapped.source_shape[1:]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        values = checkpoint.read(mapped.source, first + start, first + stop)
        if mapped.role is Role.PATCH:
            values = values[:, :, tensor.part]
        require_range(values, tensor.output.type, f"{stored.file}: tensor '{stored.name}'")
        yield quantize(
            np.ascontiguousarray(values.reshape(-1, shape[-1] if len(shape) > 1 else values.size)),
            tensor.output.type,
            n_threads,
            recipe.weights(tensor.output),
        )


def require_range(values: NDArray[np.float32], type: str, place: str) -> None:
    """FormatError where `type` does not reach to the values; `place` is their file and tensor."""
    largest = max(float(values.max()), -float(values.min()))  # NaN where any value is
    if not math.isfinite(largest):
        raise FormatError(f"{place} holds values that are not finite")
    if type not in ("F32", "BF16") and largest > _F16_MAX:
        raise FormatError(
            f"{place}: {type} reaches to {_F16_MAX:g}, found {largest:g}: convert to bf16 or f32"
        )
