"""Whole models of every quantized weight type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from conversations import conversation
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.convert import Recipe, convert_checkpoint
from weight_types import with_weights

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
WIDE = CheckpointSpec(
    hidden_size=256, intermediate_size=512, mrope_section=(8, 12, 12), embed_dim=128, num_heads=2
)


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f32")
    convert_checkpoint(write_checkpoint(folder / "checkpoint", WIDE, 3), folder / "m.gguf", Recipe("f32"))
    return folder / "m.gguf"


@pytest.mark.parametrize("name", TYPES)
def test_exact_is_float32_on_what_the_blocks_stand_for(name: str, f32_model: Path, tmp_path: Path) -> None:
    packed = with_weights(f32_model, tmp_path / "packed.gguf", name, as_f32=False)
    plain = with_weights(f32_model, tmp_path / "plain.gguf", name, as_f32=True)
    c = conversation(6, [40, (84, 56), 30])
    expected = Qwen2VL.from_gguf(plain, precision="exact").logits(c.token_ids, c.images)
    np.testing.assert_array_equal(
        Qwen2VL.from_gguf(packed, precision="exact").logits(c.token_ids, c.images), expected
    )


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("name", TYPES)
def test_fast_is_near_exact(
    name: str, isa: str, f32_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_ISA", isa)
    path = with_weights(f32_model, tmp_path / "packed.gguf", name, as_f32=False)
    # 8 bits in groups of 256, with weights as they are or requantized; elsewhere in blocks of 32.
    tolerance = {"avx2": 2e-3, "avxvnni": 4e-3, "avx512": 4e-3, "avx512_bf16": 4e-3}.get(isa, 6e-4)
    for n in (5, 100):
        token_ids = conversation(7, [n]).token_ids
        exact = Qwen2VL.from_gguf(path, precision="exact").logits(token_ids)
        fast = Qwen2VL.from_gguf(path).logits(token_ids)
        assert np.square(fast - exact).mean() / exact.var() < tolerance
