"""One measurement of this package, for peers.py: a job as a line of JSON on stdin, the result on stdout."""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import numpy as np

from qwen2vl_q import Qwen2VL, __version__
from qwen2vl_q.engine.stats import peak_memory_bytes
from qwen2vl_q.measure.benchmark import STEP_BY_STEP, Benchmark, Settings


def _last(model: Qwen2VL, tokens: list[int], n: int, images: list[Any] | None = None) -> int:
    """The last of `n` tokens after `tokens`."""
    return list(model.generate(tokens, images or [], max_new_tokens=n, **STEP_BY_STEP))[-1]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """See peers.py for the jobs."""
    model = Qwen2VL.from_gguf(job["model"], job["threads"], job["n_ctx"])
    task, n = job["task"], job["n"]
    tokens = np.random.default_rng(job["seed"]).integers(300, 150_000, max(n, 1)).tolist()
    if task in ("image", "question"):  # loads the vision tower, as the peer has done by now
        model.encode_image(np.zeros((56, 56, 3), np.uint8))
    if task == "image":
        image = model.load_image(np.load(job["picture"]))
        started = perf_counter()
        count = len(model.encode_image(image))
        seconds = [perf_counter() - started]
    elif task == "question":
        content = [
            {"type": "image", "image": np.load(job["picture"])},
            {"type": "text", "text": "What is on the left?"},
        ]
        started = perf_counter()
        ids, images = model.encode_chat([{"role": "user", "content": content}])
        _last(model, ids, 1, list(images))
        seconds, count = [perf_counter() - started], len(ids)
        # The peer's cache takes its memory at once; ours as it fills.
        rest = np.random.default_rng(job["seed"]).integers(300, 150_000, job["n_ctx"] - count).tolist()
        _last(model, [*ids, *rest], 1, list(images))
    elif task == "prefill":
        _last(model, tokens[:16], 1)  # allocates
        count, seconds = n, []
        for _ in range(job["repeat"]):
            model.reset()
            started = perf_counter()
            _last(model, tokens, 1)
            seconds.append(perf_counter() - started)
    elif task == "streams":
        settings = Settings(job["model"], decode_tokens=job["repeat"])
        streams = Benchmark(model, settings).streams(job["streams"])
        count, seconds = streams.count, [streams.run(streams.prepare())]
    else:
        count = job["repeat"]
        steps = model.generate(tokens, max_new_tokens=count + 1, **STEP_BY_STEP)
        next(steps)
        started = perf_counter()
        for _ in steps:
            pass
        seconds = [perf_counter() - started]
    return {
        "count": count,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "version": f"qwen2vl-q {__version__} ({model.isa})",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.readline()))))
