"""LoRA adapters beside a model's weights, which stay as they are."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.lora import MERGE, Adapter, Update
from qwen2vl_q.checkpoint.shapes import TextConfig, VisionConfig
from qwen2vl_q.checkpoint.tensor_map import MappedTensor, Role, map_tensors

Folder = str | os.PathLike[str]
# Or folders, each perhaps with what multiplies the adapter's own scale.
AdapterPaths = Folder | Iterable[Folder | tuple[Folder, float]]

# Of all adapters of a matrix together: more cost as much as the matrix itself. The native core's own.
_MAX_RANK = 1024
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"

Array = NDArray[np.float32]
_T = TypeVar("_T", TextConfig, VisionConfig)


class NativeUpdate(NamedTuple):
    """As `_native.Model` takes it."""

    name: str  # of the tensor in the file
    a: Array  # [rank, cols]
    b: Array  # [rows, rank], scaled


@dataclass(frozen=True)
class _Shape:
    """The head has a name of its own even where it is tied: its updates are its own."""

    text: TextConfig
    vision: VisionConfig | None
    tie_word_embeddings: bool = False


def open_adapters(lora: AdapterPaths) -> list[Adapter]:
    """Reads their headers. Raises ValueError for a scale that is no finite number, OSError, FormatError or
    UnsupportedError for a folder that is no adapter, or one that can only be merged."""
    given = [lora] if isinstance(lora, (str, os.PathLike)) else lora
    adapters = [_open(*item) if isinstance(item, tuple) else _open(item) for item in given]
    for adapter in adapters:
        adapter.require_updates_alone()
    return adapters


def native_updates(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> list[NativeUpdate]:
    """What all adapters together add to each matrix of a model; `config` is the native core's.

    Of a model without its vision tower, what is the tower's is left out. Raises FormatError for an adapter
    that does not fit the model, UnsupportedError for ranks that are too large together.
    """
    text, vision = config["text_config"], config["vision_config"]
    shape = _Shape(_sizes(TextConfig, text), _sizes(VisionConfig, vision) if vision else None)
    mapped = {m.source: m for m in map_tensors(shape)}
    _check(adapters, mapped, shape)
    factors: dict[str, list[tuple[Array, Array]]] = defaultdict(list)
    for adapter in adapters:
        for update in adapter.updates():
            b = _scaled(adapter, update)
            if update.scale == 0:
                continue
            for source in _sources(adapter, update.target, text["tie_word_embeddings"]):
                for name, rows in _parts(mapped[source], b):
                    factors[name].append((update.a, rows))
    return [_stacked(name, added) for name, added in factors.items()]


def _open(folder: Folder, scale: float = 1.0) -> Adapter:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"lora: expected a finite number as a scale, found {printable(repr(scale))}")
    return Adapter(Path(folder), scale)


def _sizes(kind: type[_T], native: Mapping[str, Any]) -> _T:
    return kind(**{field.name: native[field.name] for field in fields(kind)})


def _check(adapters: Sequence[Adapter], mapped: Mapping[str, MappedTensor], shape: _Shape) -> None:
    ranks: Counter[str] = Counter()
    for adapter in adapters:
        if shape.vision is None:
            adapter.leave_out("visual.")
        adapter.check({name: m.source_shape for name, m in mapped.items()})
        for target in adapter.targets:
            ranks[target] += adapter.rank(target)
            if ranks[target] > _MAX_RANK:
                raise UnsupportedError(
                    f"{adapter.place(target)}: expected a rank of at most {_MAX_RANK}, all adapters "
                    f"together, found {ranks[target]}, {MERGE}"
                )


def _scaled(adapter: Adapter, update: Update) -> Array:
    with np.errstate(over="ignore"):
        b = update.b * np.float32(update.scale)
    if not np.isfinite(b).all():
        raise FormatError(f"{adapter.place(update.target)}: too large for its scale, {update.scale:g}")
    return b


def _sources(adapter: Adapter, target: str, tied: bool) -> list[str]:
    """What an update is of: its target, and perhaps the head that is tied to it."""
    return [target, _HEAD] if target == _EMBEDDINGS and tied and adapter.ties_head else [target]


def _parts(mapped: MappedTensor, b: Array) -> Iterator[tuple[str, Array]]:
    """The rows of b that belong to each of the file's tensors; the two of the patch embedding are one."""
    if mapped.role is Role.PATCH:
        return iter([(mapped.targets[0], b)])
    return zip(mapped.targets, np.split(b, len(mapped.targets)), strict=True)


def _stacked(name: str, factors: Sequence[tuple[Array, Array]]) -> NativeUpdate:
    """The sum of products as one."""
    a = np.concatenate([a for a, _ in factors])
    b = np.concatenate([b for _, b in factors], axis=1)
    return NativeUpdate(name, np.ascontiguousarray(a), np.ascontiguousarray(b))
