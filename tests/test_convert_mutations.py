"""Packed checkpoints and adapters with something changed at random: converted or refused, never another
error. QWEN2VL_MUTATIONS sets how many of each kind are tried."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import factors, write_adapter
from checkpoints import CheckpointSpec, write_checkpoint
from packers import PackSpec, write_bitsandbytes_checkpoint, write_packed_checkpoint
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.convert import Adapter, Recipe, convert_checkpoint, default_recipe

SPEC = CheckpointSpec(num_hidden_layers=1, depth=1)
Q = "model.layers.0.self_attn.q_proj"
COUNT = int(os.environ.get("QWEN2VL_MUTATIONS", "30"))
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 31, 1 << 20, 1 << 31, (1 << 63) - 1, 1 << 64, 0.5, 1e400, "x",
    "gemm", "awq", "gptq", "gptq_v2", "bitsandbytes", [], [1], [[]], {}, {"a": 1}, {"-:x": {}}, {"q_proj": 0},
    "\ud800", "\x1b[2J", [64, 64], float("nan"),
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "I32", "U8", "I8", "F64", "I64", "BOOL"]


def mutate(value: Any, rng: np.random.Generator) -> Any:
    """A copy with a value somewhere inside replaced, removed or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = list(value)[rng.integers(len(value))]
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutate(value[key], rng)}
    return ODD[rng.integers(len(ODD))]


def mutate_json(path: Path, section: str | None, rng: np.random.Generator) -> None:
    config = json.loads(path.read_text())
    config = config | {section: mutate(config[section], rng)} if section else mutate(config, rng)
    path.write_text(json.dumps(config))


def mutate_header(path: Path, rng: np.random.Generator) -> None:
    """Another type, shape or name for one tensor, or other bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    # Of what is packed or adapts, more often than of all the rest.
    names = [n for n in header if "__" not in n and (n.startswith(Q) or "lora" in n or rng.random() < 0.1)]
    name = names[rng.integers(len(names))]
    info = header[name]
    begin, end = info["data_offsets"]
    match int(rng.integers(5)):
        case 0:
            info["dtype"] = DTYPES[rng.integers(len(DTYPES))]
        case 1:
            info["shape"] = [info["shape"][::-1], info["shape"][:1], [*info["shape"], 1], [], [0]][
                rng.integers(5)
            ]
        case 2:
            header[name + ["x", ".lora_A.weight", ".absmax", ".base_layer.bias"][rng.integers(4)]] = (
                header.pop(name)
            )
        case 3:
            del header[name]
        case _ if end > begin:
            where = int(rng.integers(begin, end))
            body[where : min(where + 4, end)] = rng.bytes(min(4, end - where))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    write_packed_checkpoint(folder / "gptq", SPEC, PackSpec())
    write_packed_checkpoint(folder / "awq", SPEC, PackSpec("awq", symmetric=False))
    write_bitsandbytes_checkpoint(folder / "bitsandbytes", SPEC, nested=True)
    write_checkpoint(folder / "plain", SPEC)
    tensors = factors(np.random.default_rng(0), Q, (64, 64), 4)
    write_adapter(folder / "adapter", tensors, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2})
    return {path.name: path for path in folder.iterdir()}


def attempt(work: Callable[[], object], what: str) -> bool:
    """Whether it went well; a refusal is one line of sensible length."""
    try:
        work()
    except (FormatError, UnsupportedError) as error:
        assert len(str(error)) < 2000, what
        assert str(error).isprintable(), what
        return False
    return True


def copy(source: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["gptq", "awq", "bitsandbytes"])
def test_packed_checkpoints(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    converted = 0
    for seed in range(COUNT):
        rng = np.random.default_rng(seed)
        folder = copy(sources[kind], tmp_path / "c")
        if seed % 3:
            mutate_header(folder / "model.safetensors", rng)
        else:
            mutate_json(folder / "config.json", "quantization_config", rng)
        converted += attempt(
            lambda: convert_checkpoint(folder, tmp_path / "m.gguf", default_recipe(folder), overwrite=True),  # noqa: B023
            f"seed {seed}",
        )
    assert 0 < converted < COUNT


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_adapters(sources: dict[str, Path], tmp_path: Path) -> None:
    converted = 0
    for seed in range(COUNT):
        rng = np.random.default_rng(seed)
        folder = copy(sources["adapter"], tmp_path / "a")
        if seed % 2:
            mutate_header(folder / "adapter_model.safetensors", rng)
        else:
            mutate_json(folder / "adapter_config.json", None, rng)

        def work() -> None:
            adapter = Adapter(folder)  # noqa: B023
            convert_checkpoint(
                sources["plain"], tmp_path / "m.gguf", Recipe("q4_0"), overwrite=True, adapters=[adapter]
            )

        converted += attempt(work, f"seed {seed}")
    assert 0 < converted < COUNT
