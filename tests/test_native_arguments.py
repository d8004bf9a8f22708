"""Numbers and texts that no parameter takes: told by name, never as pybind11's signatures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2vl_q import Qwen2VL, _native

HUGE = [2**31, 2**63, 2**64, -(2**63) - 1, 10**5000]
FLOATS = np.zeros((1, 32), np.float32)


def calls(model: Qwen2VL, path: Path) -> dict[str, Callable[[Any], object]]:
    """Every integer, by its name in messages."""
    native = model._native
    sequence = _native.SequenceState(native, 8)
    return {
        "n_ctx": lambda n: _native.SequenceState(native, n),
        "n_threads": lambda n: _native.Model(path, n_threads=n),
        "n_threads of limits": lambda n: _native.measure_limits(n_threads=n),
        "n_threads of quantize": lambda n: _native.quantize(FLOATS, "F16", n),
        "index": lambda n: _native.measure_device_limits("none.so", n),
        "top_k": lambda n: _native.Sampler(top_k=n),
        "token": sequence.accept,
        "token of a step": sequence.push,
        "grid_thw": lambda n: _native.Prompt(native, [1], [((1, n, 2), bytes(16))]),
        "n_ctx of a prompt": lambda n: _native.Prompt(native, [1], n_ctx=n),
    }


def found(name: str) -> str:
    return f"^{name.split(' of ')[0]}.*: expected .* found "


def test_integers_out_of_range(tiny: Qwen2VL, tiny_gguf: Path) -> None:
    for name, call in calls(tiny, tiny_gguf).items():
        for value in HUGE:
            with pytest.raises(ValueError, match=found(name)) as error:
                call(value)
            assert len(str(error.value)) < 200


def test_seeds_out_of_range() -> None:
    for value in (2**64, -1, 10**5000):
        with pytest.raises(ValueError, match=r"^seed: expected 0 to 18446744073709551615, found "):
            _native.Sampler(seed=value)


@pytest.mark.parametrize("value", [2**63, -1])
def test_memory_out_of_range(tiny_gguf: Path, value: int) -> None:
    with pytest.raises(ValueError, match=f"^device_memory: expected 0 to {2**63 - 1}, found {value}$"):
        _native.Model(tiny_gguf, device_memory=value)


def test_what_is_no_integer(tiny: Qwen2VL, tiny_gguf: Path) -> None:
    for name, call in calls(tiny, tiny_gguf).items():
        for value in (1.5, "3"):
            with pytest.raises(TypeError, match=found(name)):
                call(value)


def test_integers_of_numpy_are_integers(tiny: Qwen2VL) -> None:
    assert _native.SequenceState(tiny._native, np.int64(7)).n_ctx == 7  # type: ignore[arg-type]
    grid: Any = (np.int8(1), np.uint64(4), np.int32(4))
    assert _native.Prompt(tiny._native, [1036] * 4, [(grid, bytes(16))]).runs == [(0, 4)]


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_out_of_range(name: str) -> None:
    def make(value: Any) -> None:
        parameters: dict[str, Any] = {name: value}
        _native.Sampler(**parameters)

    for value in (10**400, float("inf")):
        with pytest.raises(ValueError, match=f"^{name}: expected "):
            make(value)
    with pytest.raises(TypeError, match=f"^{name}: expected a number, found 'hot'"):
        make("hot")


def test_texts_that_no_utf8_is(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_ISA", "\udcff\x1b")
    with pytest.raises(_native.UnsupportedError, match=r'instruction set ".*udcff\\x1b"'):
        Qwen2VL.from_gguf(tiny_gguf)
    for make in (
        lambda: _native.Model(tiny_gguf, device="\ud800"),
        lambda: _native.Model(tiny_gguf, precision="\ud800"),  # type: ignore[arg-type]
        lambda: _native.block_layout("\ud800"),
    ):
        with pytest.raises(ValueError, match=r"^(device: |precision: |unknown type ).*ud800"):
            make()
    with pytest.raises(KeyError, match="no tensor"):
        _native.GgufFile(tiny_gguf).raw("\ud800")
