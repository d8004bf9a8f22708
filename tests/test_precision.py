"""What "fast" loses where random weights would hide it: key biases of hundreds, outlier channels, odd shapes.

Errors are of the logits' energy (NMSE) to float32, which is "exact" on an F32 file (test_parity.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from conversations import Conversation, conversation
from qwen2vl_q import Qwen2VL
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint

PLAIN = {
    # head_dim 48, one key-value head; 128, two; 80, as many as query heads.
    "48": CheckpointSpec(
        hidden_size=192,
        intermediate_size=416,
        num_key_value_heads=1,
        mrope_section=(6, 9, 9),
        num_hidden_layers=4,
        embed_dim=96,
        num_heads=3,
    ),
    "128": CheckpointSpec(
        hidden_size=512,
        intermediate_size=992,
        mrope_section=(16, 24, 24),
        num_hidden_layers=3,
        embed_dim=160,
        num_heads=2,
    ),
    "80": CheckpointSpec(
        hidden_size=160,
        intermediate_size=352,
        num_attention_heads=2,
        num_key_value_heads=2,
        mrope_section=(10, 15, 15),
        num_hidden_layers=5,
        embed_dim=64,
        num_heads=2,
        depth=3,
    ),
}


def like_a_trained_one(spec: CheckpointSpec, key_bias_queries: float) -> CheckpointSpec:
    """With the key biases and outlier channels of the released models."""
    return replace(
        spec,
        rope_theta=1e6,
        outlier_channels=2,
        outlier_scale=10.0,
        key_bias=900.0,
        key_bias_queries=key_bias_queries,
    )


SPECS = {
    **{f"{name} plain": spec for name, spec in PLAIN.items()},
    **{f"{name} biased": like_a_trained_one(spec, 0.02) for name, spec in PLAIN.items()},
    **{f"{name} ordinary queries": like_a_trained_one(spec, 1.0) for name, spec in PLAIN.items()},
}
# Tiles of few rows in float32, of many in bf16; pictures.
CONVERSATIONS = {
    "few": conversation(3, [9]),
    "many": conversation(4, [200]),
    "picture": conversation(5, [5, (300, 400), 40]),
}


@dataclass(frozen=True)
class Models:
    checkpoint: Path
    logits: dict[str, NDArray[np.float32]]  # of float32

    def file(self, file_type: FileType) -> Path:
        path = self.checkpoint / f"{file_type}.gguf"
        if not path.exists():
            convert_checkpoint(self.checkpoint, path, Recipe(file_type))
        return path

    def loss(self, file_type: FileType, precision: Literal["fast", "exact"]) -> dict[str, float]:
        model = Qwen2VL.from_gguf(self.file(file_type), precision=precision)
        return {name: nmse(logits_of(model, c), self.logits[name]) for name, c in CONVERSATIONS.items()}


def logits_of(model: Qwen2VL, c: Conversation) -> NDArray[np.float32]:
    return model.logits(c.token_ids, c.images)


def nmse(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    energy = ((expected - expected.mean(axis=-1, keepdims=True)) ** 2).sum(dtype=np.float64)
    return float(((actual - expected) ** 2).sum(dtype=np.float64) / energy)


@pytest.fixture(scope="module", params=SPECS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    # Stored in bf16, so that a BF16 file has the same weights.
    spec = replace(SPECS[request.param], dtype="BF16")
    folder = write_checkpoint(tmp_path_factory.mktemp("precision"), spec, seed=1)
    convert_checkpoint(folder, folder / "f32.gguf", Recipe("f32"))
    exact = Qwen2VL.from_gguf(folder / "f32.gguf", precision="exact")
    return Models(folder, {name: logits_of(exact, c) for name, c in CONVERSATIONS.items()})


def test_q8_0_loses_about_twice_what_its_weights_lose_at_most(models: Models) -> None:
    exact, fast = models.loss("q8_0", "exact"), models.loss("q8_0", "fast")
    assert all(1e-5 < loss < 0.05 for loss in exact.values()), exact
    assert all(fast[name] < 2.1 * loss for name, loss in exact.items()), (fast, exact)


@pytest.mark.parametrize("file_type", ["bf16", "f16"])
def test_files_without_quantized_weights_lose_next_to_nothing(models: Models, file_type: FileType) -> None:
    # The language model rounds its cache to f16, the tower its attention to integers of 16 bits.
    fast = models.loss(file_type, "fast")
    assert fast["few"] < 1e-6 and fast["many"] < 1e-6 and fast["picture"] < 2e-5, fast


@pytest.mark.parity
def test_a_bf16_file_is_closer_than_the_authors_bf16(models: Models) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from reference import Reference

    reference = Reference(models.checkpoint, dtype="bfloat16")
    fast = models.loss("bf16", "fast")
    for name, c in CONVERSATIONS.items():
        authors = nmse(reference.logits(c.token_ids, c.images), models.logits[name])
        assert fast[name] < authors, (name, fast[name], authors)
