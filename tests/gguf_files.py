"""GGUF files made of others, with other keys or fewer tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Value = tuple[gguf.GGUFValueType, Any]


def u32(value: int) -> Value:
    return gguf.GGUFValueType.UINT32, value


def u16(value: int) -> Value:
    return gguf.GGUFValueType.UINT16, value


def i32(value: int) -> Value:
    return gguf.GGUFValueType.INT32, value


def f32(value: float) -> Value:
    return gguf.GGUFValueType.FLOAT32, value


def flag(value: bool) -> Value:
    return gguf.GGUFValueType.BOOL, value


def text(value: str) -> Value:
    return gguf.GGUFValueType.STRING, value


def i32s(*values: int) -> Value:
    return gguf.GGUFValueType.ARRAY, list(values)


def rewritten(
    model: Path,
    out: Path,
    keys: Mapping[str, Value] | None = None,
    keep: Callable[[str], bool] = lambda name: True,
    architecture: str = "qwen2vl",
    added: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A file with the keys and tensors of `model` whose names `keep` takes, `keys` and `added`, as `out`."""
    writer = gguf.GGUFWriter(out, architecture)
    for name, values in (added or {}).items():
        writer.add_tensor(name, values)
    _write(model, writer, keys or {}, keep)
    return out


def split_file(model: Path, folder: Path, n_tensors: int, name: str = "m") -> list[Path]:
    """Parts of `model` as llama.cpp names and marks them, `n_tensors` in each."""
    folder.mkdir(exist_ok=True)
    architecture = gguf.GGUFReader(model).fields["general.architecture"].contents()
    _write(model, gguf.GGUFWriter(folder / f"{name}.gguf", architecture, split_max_tensors=n_tensors), {})
    return sorted(folder.glob(f"{name}-*-of-*.gguf"))


def _write(
    model: Path,
    writer: gguf.GGUFWriter,
    keys: Mapping[str, Value],
    keep: Callable[[str], bool] = lambda name: True,
    named: Callable[[str], str] = lambda name: name,
) -> None:
    reader = gguf.GGUFReader(model)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")) and keep(field.name):
            kind, *element = field.types
            writer.add_key_value(field.name, field.contents(), kind, element[-1] if element else None)
    for name, (kind, value) in keys.items():
        writer.kv_data[0].pop(name, None)
        writer.add_key_value(name, value, kind, _element(value) if isinstance(value, list) else None)
    if "general.alignment" in keys:
        writer.data_alignment = keys["general.alignment"][1]
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(named(tensor.name), tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _element(values: list[Any]) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.STRING if isinstance(values[0], str) else gguf.GGUFValueType.INT32


def tower_of_2024(tower: Path, out: Path) -> Path:
    """A vision tower's file as llama.cpp's first converter for this model wrote it: fewer keys, fc1 and fc2
    under each other's name, and an embedding of positions that means nothing."""
    later = ("clip.vision.spatial_merge_size", "clip.vision.image_min_pixels", "clip.vision.image_max_pixels")
    keys = {
        "clip.vision.feed_forward_length": u32(0),
        "clip.has_text_encoder": flag(False),
        "clip.has_vision_encoder": flag(True),
        "clip.has_qwen2vl_merger": flag(True),
        "clip.use_silu": flag(False),
        "clip.use_gelu": flag(False),
    }
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    writer = gguf.GGUFWriter(out, "clip")
    writer.add_tensor("v.position_embd.weight", np.zeros((10, 10), np.float32))
    _write(
        tower,
        writer,
        keys,
        lambda name: name.startswith(("clip.", "v.", "mm.")) and name not in later,
        lambda name: re.sub("ffn_(up|down)", lambda found: swapped[found[0]], name),
    )
    return out


def is_vision(name: str) -> bool:
    """Of a key or a tensor: the vision tower's."""
    return name.startswith(("clip.", "v.", "mm."))
