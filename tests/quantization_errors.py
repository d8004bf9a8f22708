"""What quantizing costs here and in llama-quantize: `python tests/quantization_errors.py` prints a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, quants
from numpy.typing import NDArray

from qwen2vl_q import _native

INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Errors:
    """Of one tensor: sums of squares, ours and llama-quantize's. `weighted`: by rms + |x|, what llama.cpp's
    search for types with minima minimises."""

    file: str
    tensor: str
    type: str
    plain: tuple[float, float]
    weighted: tuple[float, float]


def compare(path: Path, source: Path = INTEROP / "interop-f16.gguf") -> Iterator[Errors]:
    """Of every quantized tensor of a file that llama-quantize made of `source`, in a type written here."""
    originals = {t.name: t for t in GGUFReader(source).tensors}
    for tensor in GGUFReader(path).tensors:
        type = tensor.tensor_type.name
        if type in _FLOATS:
            continue
        values = np.ascontiguousarray(originals[tensor.name].data, np.float32)
        try:
            data = _native.quantize(values, type)
        except ValueError:  # a type that is not written
            continue
        ours, theirs = (quants.dequantize(d, tensor.tensor_type) for d in (data, tensor.data))
        weights = np.abs(values) + np.sqrt(np.square(values).mean())

        def sums(found: NDArray[np.float32], values: NDArray[np.float32] = values) -> tuple[float, float]:
            e = np.square(found - values, dtype=np.float64)
            return float(e.sum()), float((e * weights).sum())  # noqa: B023

        (a, aw), (b, bw) = sums(ours), sums(theirs)
        yield Errors(path.stem, tensor.name, type, (a, b), (aw, bw))


def main() -> None:
    print("| type | tensors | error, of llama-quantize's | worst tensor | weighted | worst |")
    print("|---|---|---|---|---|---|")
    by_type: dict[str, list[Errors]] = {}
    for path in sorted(INTEROP.glob("interop-Q*.gguf")) + sorted(INTEROP.glob("interop-IQ*.gguf")):
        for errors in compare(path):
            by_type.setdefault(errors.type, []).append(errors)
    for type, rows in sorted(by_type.items()):
        plain, weighted = np.array([r.plain for r in rows]), np.array([r.weighted for r in rows])
        cells = [
            f"{v[:, 0].sum() / v[:, 1].sum():.4f} | {(v[:, 0] / v[:, 1]).max():.4f}"
            for v in (plain, weighted)
        ]
        print(f"| {type} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
