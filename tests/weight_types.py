"""Model files of any weight type, their blocks made by the Python package gguf."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from qwen2vl_q import _native


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks that gguf does not write: any integers, scales of either sign within a factor of 2."""

    halves: int  # where d (and m) stand
    steps: tuple[float, ...]  # their inverses for values of deviation 1
    scales: tuple[int, int] = (0, 0)  # of these bytes ...
    highest: int = 0  # ... the bits that make scales and minima large

    def __call__(self, rng: np.random.Generator, values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
        elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        blocks = rng.integers(0, 256, (values.size // elements, size), dtype=np.uint8)
        signs = rng.choice([-1.0, 1.0], (len(blocks), 1))
        halves = (signs * values.std() / self.steps).astype(np.float16).view(np.uint8)
        blocks[:, self.halves : self.halves + halves.shape[1]] = halves
        blocks[:, slice(*self.scales)] |= self.highest
        return blocks.reshape(len(values), -1)


RANDOM_BLOCKS = {
    "Q2_K": RandomBlocks(80, (12, 8), (0, 16), 0x88),
    "Q3_K": RandomBlocks(108, (2.3 * 24,), (104, 108), 0xFF),
    "Q4_K": RandomBlocks(0, (8 * 48, 48), (4, 12), 0xA0),
    "Q5_K": RandomBlocks(0, (16 * 48, 48), (4, 12), 0xA0),
    "IQ4_NL": RandomBlocks(0, (66,)),
    "IQ2_XXS": RandomBlocks(0, (50,)),
    "IQ3_S": RandomBlocks(0, (128,)),
    "IQ4_XS": RandomBlocks(0, (66 * 24,), (2, 4), 0xFF),
}


def encoded(rng: np.random.Generator, values: NDArray[np.float32], name: str) -> NDArray[np.uint8]:
    if name in ("Q4_0", "Q8_0", "Q6_K"):
        return _native.quantize(values, name)
    try:
        return quants.quantize(values, GGMLQuantizationType[name]).view(np.uint8)
    except NotImplementedError:
        return RANDOM_BLOCKS[name](rng, values, name)


def with_weights(source: Path, out: Path, name: str, as_f32: bool) -> Path:
    """A copy of an F32 file with its layers' weights as `name`, or as the float32 that these stand for."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    rng = np.random.default_rng(4)
    for tensor in reader.tensors:
        values = np.array(tensor.data)
        if not tensor.name.startswith("blk.") or values.ndim != 2:
            writer.add_tensor(tensor.name, values)
            continue
        kind, data = GGMLQuantizationType[name], encoded(rng, values, name)
        if as_f32:
            writer.add_tensor(tensor.name, quants.dequantize(data, kind))
        else:
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
