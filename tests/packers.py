"""Checkpoints as GPTQ, AWQ and bitsandbytes pack them, from weights that are known (no torch needed)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import Array, CheckpointSpec, random_tensors, write_checkpoint, write_safetensors


@dataclass(frozen=True)
class PackSpec:
    method: str = "gptq"  # or "awq"
    bits: int = 4
    group_size: int = 32  # -1: a row
    symmetric: bool = True
    act_order: bool = False
    layout: str = "gptq"  # or "gptq_v2": zero points as they are
    g_idx: bool = True
    empty_biases: bool = False

    @property
    def config(self) -> dict[str, Any]:
        common = {"bits": self.bits, "group_size": self.group_size, "quant_method": self.method}
        if self.method == "awq":
            return {**common, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]}
        return {**common, "desc_act": self.act_order, "sym": self.symmetric, "checkpoint_format": self.layout}


@dataclass(frozen=True)
class Matrix:
    """q [rows, columns], scales and zeros [rows, groups], group_of [columns]."""

    q: NDArray[np.int64]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int64]
    group_of: NDArray[np.int64]

    @property
    def integers(self) -> NDArray[np.int64]:
        return self.q - self.zeros[:, self.group_of]

    @property
    def weights(self) -> Array:
        return self.scales.astype(np.float32)[:, self.group_of] * self.integers.astype(np.float32)


def random_matrix(rng: np.random.Generator, rows: int, columns: int, spec: PackSpec) -> Matrix:
    size = columns if spec.group_size == -1 else spec.group_size
    groups, half = math.ceil(columns / size), 2 ** (spec.bits - 1)
    group_of = np.arange(columns) // size
    if spec.act_order:
        group_of = group_of[rng.permutation(columns)]
    # The least zero point of the first convention is 0, which it stores as all ones.
    zeros = np.full((rows, groups), half) if spec.symmetric else rng.integers(0, 2 * half, (rows, groups))
    scales = (rng.uniform(0.5, 2, (rows, groups)) * 2 / half / math.sqrt(columns)).astype(np.float16)
    q = rng.normal(half - 0.5, half / 2, (rows, columns)).round().astype(np.int64).clip(0, 2 * half - 1)
    return Matrix(q, scales, zeros, group_of)


def words(values: NDArray[np.int64], bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """[n, m] -> [n, m bits / 32], the first value in the lowest bits."""
    per_word = 32 // bits
    packed = np.zeros((len(values), values.shape[1] // per_word), np.uint32)
    for i, place in enumerate(order or range(per_word)):
        packed |= (values[:, place::per_word] & (2**bits - 1)).astype(np.uint32) << np.uint32(i * bits)
    return packed.view(np.int32)


def pack(module: str, matrix: Matrix, spec: PackSpec) -> dict[str, NDArray[Any]]:
    """A layer's tensors by their names."""
    scales = np.ascontiguousarray(matrix.scales.T)
    if spec.method == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            f"{module}.qweight": words(matrix.q.T, 4, order),
            f"{module}.qzeros": words(matrix.zeros.T, 4, order),
            f"{module}.scales": scales,
        }
    packed: dict[str, NDArray[Any]] = {
        f"{module}.qweight": np.ascontiguousarray(words(matrix.q, spec.bits).T),
        f"{module}.qzeros": words(matrix.zeros.T - (spec.layout == "gptq"), spec.bits),
        f"{module}.scales": scales,
    }
    if spec.g_idx:
        packed[f"{module}.g_idx"] = matrix.group_of.astype(np.int32)
    return packed


NF4 = np.array(  # bitsandbytes: quantiles of the normal distribution
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1],
    np.float32,
)  # fmt: skip


def pack_bitsandbytes(
    name: str, rng: np.random.Generator, rows: int, columns: int, nested: bool, block: int = 64
) -> tuple[dict[str, NDArray[Any]], Array]:
    """A weight's tensors by their names, and its values [rows, columns]."""
    indices = rng.integers(0, 16, rows * columns, np.uint8)
    n_blocks = math.ceil(indices.size / block)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16"}
    state["shape"] = [rows, columns]
    packed: dict[str, NDArray[Any]] = {
        name: (indices[::2] << 4 | indices[1::2]).reshape(-1, 1),
        f"{name}.quant_map": NF4,
    }
    if nested:
        table = np.linspace(-1, 1, 256, dtype=np.float32)
        bytes_ = rng.integers(0, 256, n_blocks, np.uint8)
        nested_scales = rng.uniform(0.01, 0.02, math.ceil(n_blocks / 256)).astype(np.float32)
        offset = np.float32(0.1)
        scales = table[bytes_] * np.repeat(nested_scales, 256)[:n_blocks] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        packed |= {
            f"{name}.absmax": bytes_,
            f"{name}.nested_absmax": nested_scales,
            f"{name}.nested_quant_map": table,
        }
    else:
        scales = rng.uniform(0.05, 0.15, n_blocks).astype(np.float32)
        packed[f"{name}.absmax"] = scales
    text = json.dumps(state).encode()
    packed[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    values = NF4[indices] * np.repeat(scales, block)[: indices.size]
    return packed, values.reshape(rows, columns)


def write_bitsandbytes_checkpoint(folder: Path, spec: CheckpointSpec, nested: bool) -> dict[str, Array]:
    """As `write_packed_checkpoint`; returns the packed weights' values."""
    rng = np.random.default_rng(7)
    write_checkpoint(folder, spec)
    values: dict[str, Array] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name, weights in random_tensors(spec, 0).items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            packed, values[name] = pack_bitsandbytes(name, rng, len(weights), weights.shape[1], nested)
            tensors |= packed
        else:
            tensors[name] = weights
    write_safetensors(folder / "model.safetensors", tensors, spec.dtype)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return values


def write_packed_checkpoint(
    folder: Path, spec: CheckpointSpec, packs: PackSpec, seed: int = 0
) -> dict[str, Matrix]:
    """Writes a checkpoint whose language model's matrices are packed; returns those by their weights' names.
    What is not packed is as `write_checkpoint` has it."""
    rng = np.random.default_rng((seed, 2))
    write_checkpoint(folder, spec, seed)
    matrices: dict[str, Matrix] = {}
    tensors: dict[str, NDArray[Any]] = {}
    for name, values in random_tensors(spec, seed).items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or not module.startswith("model.layers."):
            tensors[name] = values
            continue
        matrices[name] = random_matrix(rng, values.shape[0], values.shape[1], packs)
        tensors |= pack(module, matrices[name], packs)
        if packs.empty_biases and not module.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{module}.bias"] = np.zeros(len(values), np.float16)
    write_safetensors(folder / "model.safetensors", tensors, spec.dtype)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packs.config}))
    return matrices


def unpacked_tensors(spec: CheckpointSpec, matrices: dict[str, Matrix], seed: int = 0) -> dict[str, Array]:
    """The same checkpoint's tensors, dequantized."""
    return random_tensors(spec, seed) | {name: matrix.weights for name, matrix in matrices.items()}
