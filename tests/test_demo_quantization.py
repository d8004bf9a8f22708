"""The report of what quantization costs: its arithmetic, its tables, its plot."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from demo import cases, evaluate, quantization
from demo.evaluate import Accuracy
from demo.quantization import Distributions, Effort, Row
from qwen2vl_q import DEMO_MODEL, Qwen2VL


def row(name: str, n_bytes: int, divergence: float, right: int) -> Row:
    accuracy = {task: Accuracy(right, 100) for task in cases.TASKS}
    return Row(name, n_bytes, 8.0, accuracy, Distributions(divergence, 0.99, 12), 0.98, 0.97)


ROWS = [row("f32, exact", 4000, 0.0, 90), row("f32", 4000, 1e-6, 90), row("q8_0", 1_000, 2.5e-4, 80)]


def test_divergence_and_agreement_are_means_over_tokens() -> None:
    half, skewed, other = (np.log([p]) for p in ((0.5, 0.5), (0.75, 0.25), (0.25, 0.75)))
    same = quantization.compare([half, skewed], [half, skewed])
    assert same == Distributions(0.0, 1.0, 2)
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    found = quantization.compare(
        [np.concatenate([skewed, skewed]), skewed], [np.concatenate([skewed, other]), skewed]
    )
    assert found.tokens == 3
    assert found.divergence == pytest.approx(expected / 3)
    assert found.agreement == pytest.approx(2 / 3)


def test_accuracies_are_means_over_tasks() -> None:
    assert ROWS[2].mean_accuracy == pytest.approx(0.8)
    assert ROWS[2].standard_error == pytest.approx(0.04 / math.sqrt(len(cases.TASKS)))


def test_predictions_stand_at_the_answer() -> None:
    """The likeliest first tokens, given nothing, are those that `chat` says."""
    model = Qwen2VL.from_gguf(DEMO_MODEL)
    asked = [cases.case("what", seed) for seed in range(4)]
    for case, found in zip(asked, quantization.predictions(model, asked), strict=True):
        expected = model.tokenize(case.turns[0].answer)
        assert found.shape == (len(expected) + 1, model.config.vocab_size)
        said = model.chat(evaluate.messages(case, []), stream=False, temperature=0)
        assert model.detokenize(found.argmax(-1)[:1]) == model.detokenize(model.tokenize(said)[:1])


def test_questions_for_so_many_tokens() -> None:
    model = Qwen2VL.from_gguf(DEMO_MODEL)
    asked = quantization.with_tokens(model, 150)
    tokens = [len(model.tokenize(case.turns[-1].answer, parse_special=True)) + 1 for case in asked]
    assert sum(tokens) >= 150 > sum(tokens[:-1])
    assert [case.task for case in asked] == list(itertools.islice(itertools.cycle(cases.TASKS), len(asked)))


def test_report() -> None:
    text = quantization.markdown(ROWS, Effort(100, 12, 50), "the command", "weights")
    lines = text.splitlines()
    assert "| q8_0 | 1,000 | 8.00 | 0.00025 | 0.9900 | 0.8000 ± 0.0094 | 0.9800 | 0.9700 |" in lines
    assert "| count | 0.900 ± 0.030 | 0.900 ± 0.030 | 0.800 ± 0.040 |" in lines
    assert "over 12 tokens" in text and "of 1,800 greedy answers" in text and "of 900." in text


def test_plot_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the demo extra")
    for name in ("a.svg", "b.svg"):
        quantization.plot(ROWS, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert svg == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "q8_0 (8.00 bits)" in svg and "dc:date" not in svg
