"""How far the weights of one file are from those of another, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.tensor_map import Role, name_in_model, role_of
from qwen2vl_q.measure.model_source import ModelFile

_CHUNK_VALUES = 1 << 20  # of each file in memory at a time
_HEAD, _EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class TensorError:
    name: str  # the file's
    role: str
    type: str
    reference_type: str
    parameters: int
    squares: float  # of the differences, summed
    reference_squares: float

    @property
    def relative(self) -> float:
        """The squared error over the squared values; infinite where a value is not finite."""
        return _ratio(self.squares, self.reference_squares)


def relative_of(errors: Sequence[TensorError]) -> float:
    """Of several tensors together."""
    return _ratio(sum(e.squares for e in errors), sum(e.reference_squares for e in errors))


def _ratio(squares: float, of: float) -> float:
    if not squares:
        return 0.0
    ratio = squares / of if of else math.inf
    return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class StoredTensor:
    file: _native.GgufFile
    info: _native.TensorInfo
    role: Role

    @property
    def parameters(self) -> int:
        return math.prod(self.info.shape)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """uint8 [rows, row_bytes], as stored; equal shapes have equal numbers of rows."""
        row = self.info.shape[-1]
        row_bytes = self.info.n_bytes // (self.parameters // row)
        step = max(1, _CHUNK_VALUES // row) * row_bytes
        for begin in range(0, self.info.n_bytes, step):
            data = self.file.raw(self.info.name, begin, min(step, self.info.n_bytes - begin))
            yield data.reshape(-1, row_bytes)


def stored_tensors(model: ModelFile) -> dict[str, StoredTensor]:
    """What the model reads, by the names of its layout, heads too. UnsupportedError for a type that is not
    computed."""
    found = {}
    for path, file in zip((model.path, model.mmproj), model.open(), strict=False):
        swapped = _native.has_vision_tower(file) and _native.has_swapped_feed_forward(file)
        for info in file.tensors:
            name = name_in_model(info.name, swapped)
            role = role_of(name)
            if role is None:
                continue
            try:
                _native.block_layout(info.type)
            except ValueError as error:
                place = f"{printable(str(path), 1000)}: tensor '{printable(info.name)}'"
                raise UnsupportedError(f"{place}: {error}") from None
            found[name] = StoredTensor(file, info, role)
    return found


def paired(
    tensors: Mapping[str, StoredTensor], reference: Mapping[str, StoredTensor]
) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Those that both have; a head that one has in its embedding is that. ValueError for other shapes or a
    tensor of the model that one lacks; heads of fine-tunes may be one's own."""
    pairs = {}
    for name in {**tensors, **reference}:
        fallback = _EMBEDDING if name == _HEAD else name
        a, b = (side.get(name, side.get(fallback)) for side in (tensors, reference))
        if a is None or b is None:
            if name.startswith("head."):
                continue
            raise ValueError(
                f"tensor {printable(name)}: only {'the reference' if a is None else 'the file'} has it"
            )
        if a.info.shape != b.info.shape:
            raise ValueError(
                f"tensor {printable(name)}: expected the reference's shape {list(b.info.shape)}, "
                f"found {list(a.info.shape)}"
            )
        pairs[name] = a, b
    return pairs


def tensor_errors(
    pairs: Mapping[str, tuple[StoredTensor, StoredTensor]], progress: Callable[[int, int], None] | None = None
) -> list[TensorError]:
    """In the file's order. `progress` is told of weights compared."""
    total = sum(a.parameters for a, _ in pairs.values())
    errors, done = [], 0
    for name, (a, b) in pairs.items():
        squares, of = 0.0, 0.0
        for data, reference in zip(a.chunks(), b.chunks(), strict=True):
            expected = _native.dequantize(reference, b.info.type)
            of += _sum_of_squares(expected)
            if a.info.type != b.info.type or not np.array_equal(data, reference):
                with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is so in the sum
                    squares += _sum_of_squares(_native.dequantize(data, a.info.type) - expected)
            done += expected.size
            if progress is not None:
                progress(done, total)
        errors.append(TensorError(name, a.role.value, a.info.type, b.info.type, a.parameters, squares, of))
    return errors


def _sum_of_squares(values: NDArray[np.float32]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.square(values, dtype=np.float64).sum())
