"""The forward passes as a whole, and the sampler: the tasks of `qwen2vl-q bench`."""

from __future__ import annotations

import numpy as np
import pytest

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.measure.benchmark import GREEDY, SAMPLED, Benchmark, drawn_picture
from suite import Recorder


@pytest.mark.benchmark(group="vision tower")
@pytest.mark.parametrize("size", [(336, 224), (1024, 683)], ids=["336x224", "1024x683"])
def test_tower(record: Recorder, tasks: Benchmark, model: Qwen2VL, size: tuple[int, int]) -> None:
    if model.config.vision_config is None:
        pytest.skip("the file has no vision tower")
    record.task(tasks.image(drawn_picture(size)))


@pytest.mark.benchmark(group="prefill")
@pytest.mark.parametrize("n", [64, 512, 2048])
def test_prefill(record: Recorder, tasks: Benchmark, n: int) -> None:
    record.task(tasks.prefill(n))


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("depth", [0, 1024])
def test_decode(record: Recorder, tasks: Benchmark, depth: int) -> None:
    record.task(tasks.decode(depth))


@pytest.mark.benchmark(group="decode")
def test_decode_sampled(record: Recorder, tasks: Benchmark) -> None:
    record.task(tasks.decode(0, SAMPLED))


@pytest.mark.benchmark(group="decode")
@pytest.mark.parametrize("n", [4])
def test_streams(record: Recorder, tasks: Benchmark, n: int) -> None:
    record.task(tasks.streams(n))


SAMPLERS = {
    "greedy": GREEDY,
    "temperature": Sampling(temperature=1.0, seed=0),
    "top_p": SAMPLED,
    "top_k": Sampling(temperature=1.0, top_k=40, seed=0),
    "min_p": Sampling(temperature=1.0, min_p=0.05, seed=0),
    "penalty": Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=0),
}


@pytest.mark.benchmark(group="sampler")
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler(record: Recorder, tasks: Benchmark, model: Qwen2VL, name: str) -> None:
    """A token out of the logits after a prompt of 32."""
    state = _native.SequenceState(model._native, 32)
    state.prefill(_native.Prompt(model._native, np.array(tasks.prompt(32), np.int32)), [])
    record.call(state.sample, SAMPLERS[name].sampler(), tokens=1)
