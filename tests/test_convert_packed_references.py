"""Our reading of packed matrices against the packages that write them, where these are installed: auto-gptq
(its layer packs and unpacks), autoawq (its unpacking), bitsandbytes. Of the first two single files alone are
imported: the packages want a transformers of their time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from checkpoints import write_safetensors
from packers import PackSpec, pack, random_matrix
from qwen2vl_q.checkpoint.tensors import Checkpoint
from qwen2vl_q.convert.bitsandbytes import PackedWeight as BitsAndBytesWeight
from qwen2vl_q.convert.bitsandbytes import packed_tensors
from qwen2vl_q.convert.packed import PackedWeight
from qwen2vl_q.convert.quantization import Packing

torch: Any = pytest.importorskip("torch", reason="needs the parity extra")

ROWS, COLUMNS = 64, 128
MODULE = "model.layers.0.mlp.up_proj"


def reference(package: str, path: str) -> Any:
    """One file of an installed package, without the package's own imports."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs {package}")
    spec = importlib.util.spec_from_file_location(
        "reference", Path(found.submodule_search_locations[0]) / path
    )
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(folder: Path, tensors: dict[str, Any], packing: Packing) -> PackedWeight:
    arrays = {f"{MODULE}.{name}": np.ascontiguousarray(values) for name, values in tensors.items()}
    write_safetensors(folder / "model.safetensors", arrays)
    return PackedWeight(Checkpoint(folder), packing, f"{MODULE}.weight", ROWS, COLUMNS)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [4, 8])
def test_auto_gptq_packs_what_we_read(tmp_path: Path, bits: int, symmetric: bool, act_order: bool) -> None:
    layer_type = reference("auto_gptq", "nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    rng = np.random.default_rng(1)
    spec = PackSpec(bits=bits, symmetric=symmetric, act_order=act_order)
    matrix = random_matrix(rng, ROWS, COLUMNS, spec)
    zeros = np.maximum(matrix.zeros, 1)  # its packer spoils the words of a zero point of 0
    weights = matrix.scales.astype(np.float32)[:, matrix.group_of] * (matrix.q - zeros[:, matrix.group_of])
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = torch.from_numpy(weights.astype(np.float32))
    layer = layer_type(bits, spec.group_size, COLUMNS, ROWS, bias=False)
    layer.pack(
        linear,
        torch.from_numpy(matrix.scales.astype(np.float32)),
        torch.from_numpy(zeros.astype(np.float32)),
        torch.from_numpy(matrix.group_of.astype(np.int32)),
    )
    tensors = {name: getattr(layer, name).numpy() for name in ("qweight", "qzeros", "scales", "g_idx")}
    ours = read(tmp_path, tensors, Packing("GPTQ", bits, spec.group_size, 1))
    np.testing.assert_array_equal(ours.read(0, ROWS), weights)
    theirs = layer(torch.eye(COLUMNS)).detach().numpy().T  # weights in float16
    np.testing.assert_array_equal(weights.astype(np.float16), theirs.astype(np.float16))
    mine = pack(MODULE, random_matrix(np.random.default_rng(1), ROWS, COLUMNS, spec), spec)
    if symmetric:
        for name, values in tensors.items():
            np.testing.assert_array_equal(mine[f"{MODULE}.{name}"], values, err_msg=name)


def test_autoawq_unpacks_as_we_do(tmp_path: Path) -> None:
    unpacking = reference("awq", "utils/packing_utils.py")
    spec = PackSpec("awq", symmetric=False)
    matrix = random_matrix(np.random.default_rng(2), ROWS, COLUMNS, spec)
    tensors = {name.rsplit(".", 1)[1]: values for name, values in pack(MODULE, matrix, spec).items()}
    qweight, qzeros, scales = (torch.from_numpy(tensors[name]) for name in ("qweight", "qzeros", "scales"))
    theirs = unpacking.dequantize_gemm(qweight, qzeros, scales.float(), 4, spec.group_size).numpy().T
    ours = read(tmp_path, tensors, Packing("AWQ", 4, spec.group_size))
    np.testing.assert_array_equal(ours.read(0, ROWS), theirs)
    np.testing.assert_array_equal(ours.read(3, 21), theirs[3:21])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["scales as floats", "double quantization"])
def test_bitsandbytes_packs_what_we_read(tmp_path: Path, kind: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    weights = torch.from_numpy(np.random.default_rng(3).normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32))
    packed, state = functional.quantize_4bit(weights, quant_type=kind, compress_statistics=nested)
    tensors = {"weight": packed.numpy()}
    tensors |= {f"weight.{name}": part.numpy() for name, part in state.as_dict(packed=True).items()}
    arrays = {f"{MODULE}.{name}": values for name, values in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", arrays)
    checkpoint, packing = Checkpoint(tmp_path), Packing("bitsandbytes", 4, 0)
    checkpoint.check(packed_tensors(checkpoint, packing, f"{MODULE}.weight", ROWS, COLUMNS), [])
    ours = BitsAndBytesWeight(checkpoint, packing, f"{MODULE}.weight", ROWS, COLUMNS).read(0, ROWS)
    theirs = functional.dequantize_4bit(packed, state).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
