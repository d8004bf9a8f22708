"""One measurement of OpenVINO GenAI, for peers.py: a job as a line of JSON on stdin, the result on stdout.

Runs under the Python that has openvino-genai, and needs nothing else than that and numpy.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai

_VISION = "<|vision_start|><|image_pad|><|vision_end|>"
_QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{_VISION}What is on the left?<|im_end|>\n<|im_start|>assistant\n"
)


class OpenVino:
    """A pipeline on the CPU with OpenVINO's defaults, but for threads and the properties asked for."""

    def __init__(self, job: dict[str, Any]) -> None:
        properties = {"INFERENCE_NUM_THREADS": job["threads"], **job["properties"]}
        self._pipeline = openvino_genai.VLMPipeline(job["model"], "CPU", **properties)

    def generate(self, prompt: str, n: int, pictures: Sequence[Any] = ()) -> Any:
        """What GenAI has measured of `n` tokens after `prompt` and the pictures (uint8 [h, w, 3]) in it."""
        result = self._pipeline.generate(
            prompt,
            images=[openvino.Tensor(picture[np.newaxis]) for picture in pictures],
            max_new_tokens=n,
            ignore_eos=True,
            do_sample=False,
            apply_chat_template=False,
        )
        metrics = result.perf_metrics
        if metrics.get_num_generated_tokens() != n:
            raise RuntimeError(f"OpenVINO: {metrics.get_num_generated_tokens()} tokens instead of {n}")
        return metrics


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """See peers.py for the jobs."""
    runner = OpenVino(job)
    task, n = job["task"], job["n"]
    rng = np.random.default_rng(job["seed"])

    def text(length: int) -> str:
        """Random digits: a token each. Never the same ones again, since GenAI keeps what it has computed."""
        return "".join(rng.choice([*"0123456789"], length))

    if task in ("image", "question"):
        runner.generate(_VISION, 1, [np.zeros((56, 56, 3), np.uint8)])  # loads the vision tower
        picture = np.load(job["picture"])
        if task == "image":
            metrics = runner.generate(_VISION, 1, [picture])
            # Resizing and the lookup of two text tokens are in it.
            seconds = [metrics.get_prepare_embeddings_duration().mean / 1000]
            count = metrics.get_num_input_tokens() - 2
        else:
            started = perf_counter()
            metrics = runner.generate(_QUESTION, 1, [picture])
            seconds, count = [perf_counter() - started], metrics.get_num_input_tokens()
            runner.generate(_QUESTION + text(job["n_ctx"] - count), 1, [picture])  # its cache grows
    elif task == "prefill":
        runner.generate(text(16), 1)  # allocates
        count, seconds = n, []
        for _ in range(job["repeat"]):
            prompt = text(n)
            started = perf_counter()
            count = runner.generate(prompt, 1).get_num_input_tokens()
            seconds.append(perf_counter() - started)
    else:
        runner.generate(text(1), 2)  # allocates
        count = job["repeat"]
        metrics = runner.generate(text(max(n, 1)), count + 1)
        seconds = [metrics.get_tpot().mean * count / 1000]  # the first token is not in it
    return {
        "count": count,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "version": f"openvino-genai {version('openvino-genai')}",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.readline()))))
