"""llama.cpp's files of every type that is computed, against what llama.cpp answered from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from conversations import Parts, conversation
from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.measure.divergence import Divergence, compare

INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"
pytestmark = pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")

PRECISIONS: tuple[Literal["exact", "fast"], ...] = ("exact", "fast")
# Root mean square of log-probabilities less llama.cpp's, whose activations have 8 bits: "exact" has its loss,
# "fast" without requantized weights much the same one where blocks are llama.cpp's too (K-quants' are not),
# "fast" with them (AVX-512) one as large beside it.
TOLERANCES = {
    "f16": (0.003, 0.003),
    "bf16": (0.012, 0.012),
    "Q8_0": (0.035, 0.04),
    "Q6_K": (0.045, 0.05),
    "Q4_0": (0.033, 0.065),
    "Q4_1": (0.033, 0.065),
    "Q5_0": (0.033, 0.045),
    "Q5_1": (0.033, 0.045),
    "Q4_K_S": (0.045, 0.065),
    "Q4_K_M": (0.045, 0.065),
    "Q5_K_M": (0.045, 0.05),
    "Q2_K": (0.045, 0.065),
    "Q3_K_M": (0.045, 0.065),
    "IQ4_NL": (0.033, 0.065),
    "IQ4_XS": (0.045, 0.065),
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((INTEROP / "llama_cpp_golden.json").read_text(encoding="utf-8"))
    return answers


def log_probabilities(m: Qwen2VL, prompt: list[int], answer: list[int]) -> NDArray[np.float64]:
    """[answer, vocabulary]: before each of its tokens."""
    logits = m.logits(prompt + answer)[len(prompt) - 1 : -1].astype(np.float64)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def test_every_file_is_in_the_table_or_refused_by_its_type(golden: dict[str, Any]) -> None:
    for name in golden["models"]:
        if name.removeprefix("interop-").removesuffix(".gguf") in TOLERANCES:
            continue
        with pytest.raises(UnsupportedError, match=rf"{name}: \S+: stored as \w+, which is not computed"):
            Qwen2VL.from_gguf(INTEROP / name)


@pytest.mark.parametrize("isa", ["generic", ""])
@pytest.mark.parametrize("name", TOLERANCES)
def test_log_probabilities_are_llama_cpps(
    name: str, isa: str, golden: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Teacher forcing: llama.cpp's tokens are fed back."""
    monkeypatch.setenv("QWEN2VL_ISA", isa)
    answer = golden["models"][f"interop-{name}.gguf"]
    for precision, tolerance in zip(PRECISIONS, TOLERANCES[name], strict=True):
        m = Qwen2VL.from_gguf(INTEROP / f"interop-{name}.gguf", precision=precision)
        found = log_probabilities(m, golden["prompt_tokens"], answer["tokens"])
        differences = [
            row[token] - expected
            for row, step in zip(found, answer["steps"], strict=False)
            for token, expected in step or ()
        ]
        assert len(differences) >= 240
        assert np.sqrt(np.mean(np.square(differences))) < tolerance


def with_a_tower(name: str, precision: Literal["exact", "fast"]) -> Qwen2VL:
    return Qwen2VL.from_gguf(
        INTEROP / f"interop-{name}.gguf", mmproj=INTEROP / "interop-mmproj-f16.gguf", precision=precision
    )


@pytest.mark.parametrize("parts", [[240], [12, (112, 84), 60]], ids=["text", "picture"])
@pytest.mark.parametrize("name", [name for name in TOLERANCES if not name.endswith("f16")])
def test_fast_loses_little_beside_the_weights(name: str, parts: Parts) -> None:
    """The more bits they have, the more 8 bits of the inputs count (docs/decisions/0043)."""
    asked = [conversation(seed, parts) for seed in range(100, 108)]
    checkpoint = with_a_tower("bf16", "exact")
    expected = [checkpoint.logits(c.token_ids, c.images) for c in asked]
    exact, fast = (
        Divergence.of(
            compare(a, m.logits(c.token_ids, c.images)) for a, c in zip(expected, asked, strict=True)
        ).mean
        for m in (with_a_tower(name, precision) for precision in PRECISIONS)
    )
    assert 1 < fast / exact < (1.5 if name == "Q8_0" else 1.1)


@pytest.mark.parametrize("tower", ["f16", "q8_0"])
@pytest.mark.parametrize("name", TOLERANCES)
def test_answers_about_a_picture(name: str, tower: str) -> None:
    """With the tower in a file of its own, "fast" near "exact"."""
    c = conversation(5, [12, (112, 84), 60])
    exact, fast = (
        Qwen2VL.from_gguf(
            INTEROP / f"interop-{name}.gguf",
            mmproj=INTEROP / f"interop-mmproj-{tower}.gguf",
            precision=precision,
        ).logits(c.token_ids, c.images)
        for precision in PRECISIONS
    )
    assert np.square(fast - exact).mean() / exact.var() < 0.01
