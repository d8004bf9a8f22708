"""One measurement of llama.cpp, for peers.py: a job as a line of JSON on stdin, the result as one on stdout.

Runs under the Python that has llama-cpp-python, and needs nothing else than that and numpy.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as llama
from llama_cpp import mtmd_cpp as mtmd

_QUESTION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{marker}"
    "What is on the left?<|im_end|>\n<|im_start|>assistant\n"
)
_WARM_UP = 8  # tokens of a stream
_silent = llama.llama_log_callback(lambda *_: None)


def _found(what: str, handle: Any) -> Any:
    if not handle:
        raise RuntimeError(f"llama.cpp: {what} failed")
    return handle


def _done(what: str, code: int) -> None:
    if code != 0:
        raise RuntimeError(f"llama.cpp: {what} returned {code}")


class LlamaCpp:
    """A model and its context with llama.cpp's defaults, but for threads and sizes."""

    def __init__(self, job: dict[str, Any]) -> None:
        for set_log in (llama.llama_log_set, mtmd.mtmd_log_set, mtmd.mtmd_helper_log_set):
            set_log(_silent, None)
        llama.llama_backend_init()
        self._model = _found(
            "loading the model",
            llama.llama_model_load_from_file(job["model"].encode(), llama.llama_model_default_params()),
        )
        params = llama.llama_context_default_params()
        params.n_ctx = job["n_ctx"] * job["streams"]
        params.n_seq_max = job["streams"]  # each with cells of its own
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = job["threads"]
        self._context = _found("making a context", llama.llama_init_from_model(self._model, params))
        self._n_batch: int = params.n_batch
        self._n_vocab: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads: int = job["threads"]

    def best_token(self, row: int = -1) -> int:
        """After a row of the last batch."""
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._n_vocab,))
        if not np.isfinite(logits).all():
            raise RuntimeError("llama.cpp: the logits are not finite")
        return int(logits.argmax())

    def evaluate(self, tokens: Sequence[int]) -> int:
        """The most likely token after them."""
        for begin in range(0, len(tokens), self._n_batch):
            part = tokens[begin : begin + self._n_batch]
            held = (llama.llama_token * len(part))(*part)  # the batch points into it
            batch = llama.llama_batch_get_one(held, len(part))
            _done("decoding", llama.llama_decode(self._context, batch))
        return self.best_token()

    def evaluate_rows(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """Rows (token, position, sequence) in one batch; the most likely token after each of those wanted."""
        batch = llama.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, i in wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        _done("decoding", llama.llama_decode(self._context, batch))
        llama.llama_batch_free(batch)
        return [self.best_token(row) for row in wanted]

    def decode_streams(self, prompts: Sequence[Sequence[int]], warm_up: int, steps: int) -> float:
        """Seconds of `steps` tokens of every prompt, a sequence each, after `warm_up` others."""
        tokens = [
            self.evaluate_rows([(t, at, i) for at, t in enumerate(prompt)], [len(prompt) - 1])[0]
            for i, prompt in enumerate(prompts)
        ]
        started = 0.0
        for step in range(warm_up + steps):
            if step == warm_up:
                started = perf_counter()
            rows = [(t, len(prompts[i]) + step, i) for i, t in enumerate(tokens)]
            tokens = self.evaluate_rows(rows, range(len(rows)))
        return perf_counter() - started

    def forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def load_vision(self, path: str) -> None:
        params = mtmd.mtmd_context_params_default()
        params.use_gpu = params.print_timings = params.warmup = False
        params.n_threads = self._threads
        self._vision = _found(
            "loading the vision tower", mtmd.mtmd_init_from_file(path.encode(), self._model, params)
        )

    def tokenize(self, picture: Any) -> Any:
        """The question's chunks, the picture (uint8 [h, w, 3]) resized and normalized within."""
        height, width, _ = picture.shape
        pixels = np.ascontiguousarray(picture)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        _found("making a bitmap", bitmap)
        text = _QUESTION.format(marker=mtmd.mtmd_default_marker().decode()).encode()
        chunks = _found("making chunks", mtmd.mtmd_input_chunks_init())
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        prompt = mtmd.mtmd_input_text(text, len(text), True, True)
        _done(
            "tokenizing",
            mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(prompt), bitmaps, 1),
        )
        return chunks

    def encode_image(self, chunks: Any) -> int:
        """Its number of tokens."""
        for i in range(mtmd.mtmd_input_chunks_size(chunks)):
            chunk = mtmd.mtmd_input_chunks_get(chunks, i)
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                _done("encoding", mtmd.mtmd_encode_chunk(self._vision, chunk))
                return int(mtmd.mtmd_input_chunk_get_n_tokens(chunk))
        raise RuntimeError("llama.cpp: no image among the chunks")

    def answer(self, chunks: Any) -> int:
        """The question's number of tokens, after its first answer token is known."""
        end = llama.llama_pos(0)
        _done(
            "evaluating the question",
            mtmd.mtmd_helper_eval_chunks(
                self._vision, self._context, chunks, 0, 0, self._n_batch, True, ctypes.byref(end)
            ),
        )
        self.best_token()
        return int(mtmd.mtmd_helper_get_n_tokens(chunks))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """See peers.py for the jobs."""
    runner = LlamaCpp(job)
    task, n = job["task"], job["n"]
    tokens = np.random.default_rng(job["seed"]).integers(300, 150_000, max(n, 1)).tolist()
    if task in ("image", "question"):
        runner.load_vision(job["mmproj"])
        picture = np.load(job["picture"])
        if task == "image":
            chunks = runner.tokenize(picture)
            started = perf_counter()
            count = runner.encode_image(chunks)
        else:
            started = perf_counter()
            count = runner.answer(runner.tokenize(picture))
        seconds = [perf_counter() - started]
    elif task == "prefill":
        runner.evaluate(tokens[:16])  # allocates
        count, seconds = n, []
        for _ in range(job["repeat"]):
            runner.forget()
            started = perf_counter()
            runner.evaluate(tokens)
            seconds.append(perf_counter() - started)
    elif task == "streams":
        random = np.random.default_rng(job["seed"])
        prompts = random.integers(300, 150_000, (job["streams"], n)).tolist()
        count = job["streams"] * job["repeat"]
        seconds = [runner.decode_streams(prompts, _WARM_UP, job["repeat"])]
    else:
        token = runner.evaluate(tokens)
        count, seconds = job["repeat"], []
        started = perf_counter()
        for _ in range(count):
            token = runner.evaluate([token])
        seconds.append(perf_counter() - started)
    return {
        "count": count,
        "seconds": seconds,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "version": f"llama-cpp-python {llama_cpp.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.readline()))))
