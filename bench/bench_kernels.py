"""Matmuls and attention on a model's own weights, timed inside its forward passes, and the block quantizers.

bench/kernels/bench_kernels.cpp has each kernel of each instruction set alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.measure.benchmark import Benchmark, drawn_picture
from suite import STAGE_CLOCK, Recorder

LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


@pytest.mark.benchmark(group="kernels, many rows", timer=STAGE_CLOCK)
@pytest.mark.parametrize("stage", (*LINEAR[:-1], "attention"))
def test_text_512_rows(record: Recorder, tasks: Benchmark, stage: str) -> None:
    record.task(tasks.prefill(512), f"text {stage}")


@pytest.mark.benchmark(group="kernels, one row", timer=STAGE_CLOCK)
@pytest.mark.parametrize("stage", LINEAR)
def test_text_one_row(record: Recorder, tasks: Benchmark, stage: str) -> None:
    record.task(tasks.decode(0), f"text {stage}")


@pytest.mark.benchmark(group="kernels, one row", timer=STAGE_CLOCK)
def test_text_attention_after_1024(record: Recorder, tasks: Benchmark) -> None:
    record.task(tasks.decode(1024), "text attention")


@pytest.mark.benchmark(group="kernels, vision tower", timer=STAGE_CLOCK)
@pytest.mark.parametrize("stage", ["patch_embed", "qkv", "attention", "proj", "fc1", "fc2", "merger"])
def test_image(record: Recorder, tasks: Benchmark, model: Qwen2VL, stage: str) -> None:
    if model.config.vision_config is None:
        pytest.skip("the file has no vision tower")
    record.task(tasks.image(drawn_picture((336, 224))), f"image {stage}")


@pytest.mark.benchmark(group="quantizers")
@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("direction", ["quantize", "dequantize"])
def test_blocks(record: Recorder, direction: str, type: str) -> None:
    """2**20 values, some 1 % of a layer of the 2B model."""
    values = np.random.default_rng(0).normal(0, 1, (1024, 1024)).astype(np.float32)
    if direction == "quantize":
        record.call(_native.quantize, values, type)
    else:
        record.call(_native.dequantize, _native.quantize(values, type), type)
