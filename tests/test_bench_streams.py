"""qwen2vl-q bench --streams: calls of generate that are under way together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import Run
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.measure.benchmark import Benchmark, Settings
from tables import cells


def test_streams_are_calls_that_share_every_step(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf, 1)
    bench = Benchmark(model, Settings("tiny", decode_tokens=20))
    rows: list[list[int]] = []
    step = _native.step

    def counting(states: Any, n: Any, progress: Any = None) -> None:
        step(states, n, progress)
        rows.append(list(n))

    monkeypatch.setattr(_native, "step", counting)
    task = bench.streams(8)
    for _ in range(2):  # the second finds the prompts
        state = task.prepare()
        rows.clear()
        assert task.run(state) > 0
        assert rows == [[1] * 8] * 20
    assert task.count == 8 * 20


def test_streams_that_the_context_ends(tiny_gguf: Path) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf, 1, n_ctx=50)
    task = Benchmark(model, Settings("tiny.gguf", decode_tokens=64)).streams(2)
    with pytest.raises(ValueError, match=r"tiny.gguf: the context ended after 11 of 64 tokens"):
        task.run(task.prepare())


def test_streams_are_measured_by_default(run: Run, tiny_gguf: Path) -> None:
    options = ["--only", "streams", "--decode-tokens", 2, "--repeat", 1, "-t", 1]
    code, out, _ = run("bench", "-m", tiny_gguf, *options)
    assert code == 0 and "prefill" not in out
    rows = [row for row in cells(out) if "decode at 32" in row[1]]
    assert [row[1] for row in rows] == [
        *("1 stream, decode at 32 (2 tokens)", "2 streams, decode at 32 (4 tokens)"),
        *("8 streams, decode at 32 (16 tokens)", "32 streams, decode at 32 (64 tokens)"),
    ]
    assert all(seconds and rate and not floor for _, _, seconds, rate, floor, _ in rows)
    assert rows[0][-1] == "1.00 x" and all(row[-1].endswith(" x") for row in rows)
    code, out, _ = run("bench", "-m", tiny_gguf, *options, "--streams", "2")
    assert code == 0
    assert [row[-1] for row in cells(out) if "2 streams" in row[1]] == [""]
