"""The soak of tests/soak.py: seconds of it here, ten minutes with `pytest -m soak`."""

from __future__ import annotations

import sys

import pytest

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from soak import Sample, Soak, Wrong, growth, soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.mark.slow
def test_seconds_of_mixed_conversations() -> None:
    samples = soak(15, most=64e6)  # less than a fifth of it warms everything up
    assert samples[-1].answers and samples[-1].parts


@pytest.mark.soak
def test_ten_minutes_of_mixed_conversations(request: pytest.FixtureRequest) -> None:
    if "soak" not in request.config.option.markexpr:
        pytest.skip("ten minutes: asked for with -m soak")
    soak(600)


def test_a_wrong_answer_fails() -> None:
    model = Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2, n_ctx=1024)
    work = Soak(model, conversations=2)
    for answers in work.alone.values():
        answers[1] = f"?{answers[1]}"
    with pytest.raises(Wrong, match="conversation 1: expected '\\?"):
        work.run(60)


def test_growth_is_that_after_the_warm_up() -> None:
    def samples(resident: list[int]) -> list[Sample]:
        return [Sample(t, 0, 0, r, 0) for t, r in enumerate(resident)]

    assert growth(samples([0, 50, 100, 100, 100, 100, 100, 100, 100, 100, 100])) == 0
    assert growth(samples([100, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109])) == 6
