"""A Hugging Face checkpoint becomes one GGUF file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q._native import dequantize, quantize
from qwen2vl_q.base.atomic_file import part_of
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.lora import Adapter
from qwen2vl_q.checkpoint.tensor_map import MappedTensor, Role, map_heads, map_tensors, other_modules
from qwen2vl_q.checkpoint.tensors import Checkpoint
from qwen2vl_q.convert.config import read_config
from qwen2vl_q.convert.files import model_name
from qwen2vl_q.convert.metadata import metadata
from qwen2vl_q.convert.recipe import FileType, Recipe, TextShape, type_for_row
from qwen2vl_q.convert.tokenizer_files import read_tokenizer
from qwen2vl_q.convert.weights import Weights
from qwen2vl_q.convert.writer import OutputTensor, Progress, write_gguf
from qwen2vl_q.engine.model_parts import check_model_file

_CHUNK_VALUES = 1 << 22  # values in memory at a time (16 MiB as float32), however large the tensor
_F16_MAX = 65504.0  # F16 values, and the F16 scales of the block types, end here


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of the file and where it comes from: part `part` of the checkpoint's tensor."""

    mapped: MappedTensor
    part: int
    output: OutputTensor
    wanted: str  # the recipe's type; output.type is another where its blocks do not divide a row
    origin: str | None  # what the checkpoint's tensor was quantized with
    kept: bool  # whether its integers are written as they are
    hindrance: str  # why no type would


@dataclass
class Difference:
    """Of what is written from what a quantized checkpoint holds, summed over a tensor."""

    squares: float = 0.0
    of: float = 0.0

    def add(self, written: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        self.squares += float(np.square(written - values, dtype=np.float64).sum())
        self.of += float(np.square(values, dtype=np.float64).sum())

    @property
    def relative(self) -> float:
        """The error's root mean square over the values'; 0 where nothing is lost."""
        return math.sqrt(self.squares / self.of) if self.squares else 0.0


@dataclass(frozen=True)
class Report:
    path: Path
    n_bytes: int
    tensors: Sequence[ConvertedTensor]
    notes: Sequence[str]
    differences: Mapping[str, Difference]  # of the tensors that were quantized, by their names in the file


def default_recipe(source: Path, vision_type: FileType | None = None) -> Recipe:
    """For the checkpoint in the folder `source`: the integers of its packed matrices are kept, and the rest
    gets the type nearest to theirs. Errors as of `convert_checkpoint`."""
    packing = read_config(source).packing
    return Recipe("q8_0" if packing and packing.bits == 8 else "q4_0", vision_type, keep_packed=True)


def convert_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    adapters: Sequence[Adapter] = (),
    n_threads: int = 0,
) -> Report:
    """Converts the checkpoint in the folder `source` to the file `out`, which appears whole or not at all.
    `adapters` are merged in float32, one after the other, before anything is quantized.

    What it becomes has to pass the runtime's own checks, before the tensors are quantized, on `n_threads` (0:
    one for each core). Raises FormatError or UnsupportedError for a checkpoint that is damaged or not a
    Qwen2-VL, and what `Recipe.check` raises, FileExistsError where `out` exists and `overwrite` is false,
    OSError for the disk's errors.
    """
    notes = _leftover_notes(out)
    config = read_config(source)
    checkpoint = Checkpoint(source)
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items()}
    heads = map_heads(config, shapes)
    others = other_modules(shapes, heads)
    mapped = [*map_tensors(config), *heads]
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    ignored = [*tied, *(name for names in others.values() for name in names)]
    for adapter in adapters if config.tie_word_embeddings else ():
        adapter.check_tied()
    weights = Weights(checkpoint, config.packing, mapped, ignored, adapters)
    tokenizer = read_tokenizer(source, config)
    tensors = _plan(mapped, weights, recipe)
    text = (name or model_name(source)).encode(errors="replace").decode()  # a path may be no Unicode
    n_parameters = sum(t.output.n_elements for t in tensors)
    head_names = [h.source.removesuffix(".weight") for h in heads if h.role is Role.HEAD]
    entries = metadata(text, config, _file_type(tensors, recipe), tokenizer, n_parameters, head_names)
    by_name = {tensor.output.name: tensor for tensor in tensors}
    differences = {tensor.output.name: Difference() for tensor in tensors if tensor.origin}
    size = write_gguf(
        out,
        entries,
        [tensor.output for tensor in tensors],
        lambda output: _chunks(
            weights, by_name[output.name], differences.get(output.name), recipe, n_threads
        ),
        overwrite,
        progress,
        check=lambda part: _check(part, config.path),
    )
    notes += [
        f"{name} is not written: config.json ties the head to the embeddings"
        for name in tied
        if name in checkpoint.tensors
    ]
    notes += recipe.notes([tensor.output for tensor in tensors])
    if "default" not in tokenizer.chat_templates:
        notes.append("the checkpoint has no chat template: Qwen2-VL's own is used")
    notes += _head_notes(head_names, others)
    notes += [adapter.summary() for adapter in adapters]
    notes += _packed_notes(weights, tensors, differences)
    return Report(out, size, tensors, notes, differences)


def _head_notes(kept: Sequence[str], others: Mapping[str, Sequence[str]]) -> list[str]:
    return [
        *(f"{name}, a linear map of the hidden states, is kept as head.{name}" for name in kept),
        *(
            f"{printable(name)} ({len(names)} tensors) is not written: it is no linear map of hidden states"
            for name, names in others.items()
        ),
    ]


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


def _plan(mapped: Sequence[MappedTensor], weights: Weights, recipe: Recipe) -> list[ConvertedTensor]:
    shape = TextShape.of({target: m.target_shape for m in mapped for target in m.targets})
    tensors = []
    for m in mapped:
        weight = weights.open(m)
        for part, target in enumerate(m.targets):
            wanted = recipe.wanted(m.role, target, shape)
            if recipe.keeps(m.role) and weight.origin:
                wanted = weight.kept[0] if weight.kept else "Q8_0"
            type = type_for_row(wanted, m.target_shape[-1])
            output, kept = OutputTensor(target, type, m.target_shape), type in weight.kept
            tensors.append(ConvertedTensor(m, part, output, wanted, weight.origin, kept, weight.hindrance))
    recipe.check([tensor.output for tensor in tensors])
    return tensors


def _file_type(tensors: Sequence[ConvertedTensor], recipe: Recipe) -> str:
    """Where the checkpoint's own types are kept, that of most matrices."""
    types = Counter(tensor.output.type.lower() for tensor in tensors if tensor.origin)
    return types.most_common(1)[0][0] if recipe.keep_packed and types else recipe.type


def _packed_notes(
    weights: Weights, tensors: Sequence[ConvertedTensor], differences: Mapping[str, Difference]
) -> list[str]:
    """For each kind of quantized tensor, what became of it."""
    groups: dict[tuple[str, str, str, bool, str], list[float]] = {}
    for t in tensors:
        if t.origin:
            key = (t.origin, t.mapped.role.value, t.output.type, t.kept, t.hindrance)
            groups.setdefault(key, []).append(differences[t.output.name].relative)
    notes = []
    for (origin, role, type, kept, hindrance), errors in groups.items():
        done = f"kept as {type}" if kept else f"quantized anew to {type}"
        why = f" ({hindrance})" if hindrance else ""
        loss = f"relative error up to {max(errors):.2g}" if max(errors) else "nothing lost"
        notes.append(f"{origin}: {len(errors)} of {role} {done}{why}: {loss}")
    if weights.empty_biases:
        n = len(weights.empty_biases)
        notes.append(f"{n} biases of zeros, which the model does not have, are left out")
    return notes


def _chunks(
    weights: Weights,
    tensor: ConvertedTensor,
    difference: Difference | None,
    recipe: Recipe,
    n_threads: int,
) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes, a slice of rows at a time; `difference` is added to."""
    mapped, shape, type = tensor.mapped, tensor.output.shape, tensor.output.type
    weight = weights.open(mapped)
    first = tensor.part * shape[0] if mapped.split_axis == 0 else 0
    step = max(1, _CHUNK_VALUES // math.prod(mapped.source_shape[1:]))
    for start in range(first, first + shape[0], step):
        stop = min(start + step, first + shape[0])
        values = weight.read(start, stop)
        if mapped.role is Role.PATCH:
            values = values[:, :, tensor.part]
        require_range(values, type, weights.place(mapped))
        rows = np.ascontiguousarray(values.reshape(-1, shape[-1] if len(shape) > 1 else values.size))
        if tensor.kept:
            data = weight.blocks(start, stop, type)
        else:
            data = quantize(rows, type, n_threads, recipe.weights(tensor.output))
        if difference is not None:
            difference.add(dequantize(data, type), rows)
        yield data


def require_range(values: NDArray[np.float32], type: str, place: str) -> None:
    """FormatError where `type` does not reach to the values; `place` is their file and tensor."""
    largest = max(float(values.max()), -float(values.min()))  # NaN where any value is
    if not math.isfinite(largest):
        raise FormatError(f"{place} holds values that are not finite")
    if type not in ("F32", "BF16") and largest > _F16_MAX:
        raise FormatError(
            f"{place}: {type} reaches to {_F16_MAX:g}, found {largest:g}: convert to bf16 or f32"
        )
