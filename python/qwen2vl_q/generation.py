"""One conversation's cache on a native model: images and tokens in, tokens out."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.config import Qwen2VLConfig
from qwen2vl_q.embedding_cache import EmbeddingCache
from qwen2vl_q.errors import Qwen2VLError
from qwen2vl_q.image_processor import ImageProcessor, ProcessedImage
from qwen2vl_q.stats import FinishReason, GenerationStats, peak_memory_bytes
from qwen2vl_q.text_stream import TextStream

# Called with a stage ("load", "image", "prefill") and how far it is, at most every 50 ms. An exception
# raised in it cancels the call.
Progress: TypeAlias = "Callable[[str, int, int], None]"
TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"

_PAGE = 64  # cells, one of which may be needed
IMAGE_CACHE_BYTES = 256 * 1024 * 1024  # some fifty photos of the 2B model


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """The native module's kind of callback for one stage."""
    return None if progress is None else partial(progress, name)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt, checked against model and context."""

    prompt: _native.Prompt
    images: list[ProcessedImage]
    ends: list[int]  # of each image, one past its last pad token


class _Call:
    """What one call of `generate` has taken so far."""

    def __init__(self, stats: GenerationStats) -> None:
        self.stats = stats

    def count(self, **increments: float) -> None:
        counted: dict[str, Any] = {
            name: getattr(self.stats, name) + value for name, value in increments.items()
        }
        self.stats = replace(self.stats, **counted)


class Generation:
    """Owns the KV cache and the images' embeddings; `lock` lets one thread at them at a time."""

    def __init__(
        self, native: _native.Model, config: Qwen2VLConfig, processor: ImageProcessor, n_ctx: int
    ) -> None:
        self._native = native
        self._config = config
        self._processor = processor
        self._n_ctx = n_ctx
        native.limit_cache(2 * (n_ctx + _PAGE) * native.cell_bytes)  # the conversation's, and one of `logits`
        self.lock = threading.RLock()
        _alive.add(self)
        self._call = _Call(GenerationStats())  # the one whose tokens the cache ends with
        self._kv_bytes = 0
        self.reset()

    def reset(self) -> None:
        """Forgets the cache and the embeddings."""
        with self.lock:
            self._native.forget()  # which says so where a call is under way
            self._sequence = _native.SequenceState(self._native, self._n_ctx)
            self._native.forget()  # the old one's pages too
            self._call = _Call(self._call.stats)  # the old one's cache is gone
            self._kv_bytes = 0
            self._embeddings = EmbeddingCache(IMAGE_CACHE_BYTES)

    @property
    def stats(self) -> GenerationStats:
        """Of the latest call; may be asked for while it computes."""
        return replace(self._call.stats, kv_bytes=self._kv_bytes, peak_memory_bytes=peak_memory_bytes())

    def token_count(self, image: ProcessedImage) -> int:
        t, h, w = image.grid_thw
        return t * h * w // self._processor.merge_size**2

    def as_ids(self, token_ids: TokenIds) -> NDArray[np.int32]:
        """ValueError for what is not a row of token ids of the model."""
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token_ids: expected integers [n], n > 0, found {ids.dtype} {list(ids.shape)}")
        vocab_size = self._config.vocab_size
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if outside.size:
            first = outside[0]
            raise ValueError(f"token_ids[{first}]: expected 0..{vocab_size - 1}, found {ids[first]}")
        return ids.astype(np.int32)

    def prepare(self, token_ids: TokenIds, images: list[ProcessedImage]) -> Prepared:
        """Finds each image's run of pad tokens. ValueError where they do not fit or pass n_ctx."""
        ids = self.as_ids(token_ids)
        expected = [self.token_count(image) for image in images]
        if len(ids) > self._n_ctx:
            raise ValueError(
                f"the prompt takes {len(ids)} tokens, {sum(expected)} of them for {len(images)} image(s), "
                f"but the context holds {self._n_ctx} (n_ctx)"
            )
        pad = self._config.image_token_id
        starts, lengths = _runs(ids, pad)
        if lengths != expected:
            raise ValueError(
                f"token_ids: expected runs of <|image_pad|> ({pad}) of {expected} tokens, one an image, "
                f"found {lengths}"
            )
        placed = [(start, image.grid_thw, image.key) for start, image in zip(starts, images, strict=True)]
        prompt = _native.Prompt(self._native, ids, placed)
        return Prepared(prompt, images, [s + n for s, n in zip(starts, lengths, strict=True)])

    def embed(self, image: ProcessedImage, progress: Progress | None) -> NDArray[np.float32]:
        """float32 [n_tokens, hidden_size]; read-only where it is kept for the next time."""
        with self.lock:
            found = self._embeddings.get(image.key)
            if found is None:
                found = self._native.encode_pixels(
                    image.pixels, self._processor.levels(), image.grid_thw, stage(progress, "image")
                )
                self._embeddings.put(image.key, found)
            return found

    def logits(self, prepared: Prepared, progress: Progress | None) -> NDArray[np.float32]:
        """Every row's, in a cache of their own."""
        embeddings = [self.embed(image, progress) for image in prepared.images]
        sequence = _native.SequenceState(self._native, self._n_ctx)
        return sequence.prefill_logits(prepared.prompt, embeddings, stage(progress, "prefill"))

    def steps(
        self,
        prepared: Prepared,
        sampler: _native.Sampler,
        max_new_tokens: int,
        text: TextStream,
        progress: Progress | None,
    ) -> Iterator[tuple[int, str]]:
        """New tokens, each with the text that it makes certain. Arguments are checked before the first."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a positive number, found {max_new_tokens}")
        # The last token drawn takes no cell.
        room = self._n_ctx - len(prepared.prompt) + 1
        cut: FinishReason = "context" if room < max_new_tokens else "length"
        return self._decode(prepared, sampler, min(max_new_tokens, room), cut, text, progress)

    def _decode(
        self,
        prepared: Prepared,
        sampler: _native.Sampler,
        limit: int,
        cut: FinishReason,
        text: TextStream,
        progress: Progress | None,
    ) -> Iterator[tuple[int, str]]:
        with self.lock:
            call = self._prefill(prepared, progress)
            start = perf_counter()
            token = self._sequence.sample(sampler)  # where a device's work ends
            call.count(generated_tokens=1, prefill_seconds=perf_counter() - start)
        for drawn in range(1, limit + 1):
            piece = text.push(token)
            if text.finished or drawn == limit:
                call.stats = replace(call.stats, finish_reason="stop" if text.finished else cut)
                yield token, piece
                return
            yield token, piece
            with self.lock:
                if call is not self._call:
                    raise Qwen2VLError("another call has taken over this model's cache; start this one again")
                start = perf_counter()
                self._sequence.accept(token)
                self._kv_bytes = self._sequence.kv_bytes
                token = self._sequence.sample(sampler)
                call.count(generated_tokens=1, decode_seconds=perf_counter() - start)

    def _prefill(self, prepared: Prepared, progress: Progress | None) -> _Call:
        """Brings the cache to the prompt's end. What stops half-way leaves whole cells to use on."""
        kept = self._sequence.reuse(prepared.prompt)
        self._call = call = _Call(GenerationStats(prompt_tokens=len(prepared.prompt), reused_tokens=kept))
        embeddings: list[NDArray[np.float32] | None] = []
        for image, end in zip(prepared.images, prepared.ends, strict=True):
            if end <= kept:
                embeddings.append(None)
                continue
            fresh = self._embeddings.get(image.key) is None
            start = perf_counter()
            embeddings.append(self.embed(image, progress))
            if fresh:
                call.count(image_tokens=self.token_count(image), encode_seconds=perf_counter() - start)
        start = perf_counter()
        try:
            self._sequence.prefill(prepared.prompt, embeddings, stage(progress, "prefill"))
        finally:
            self._kv_bytes = self._sequence.kv_bytes
        call.count(prefill_seconds=perf_counter() - start)
        return call


# A lock that another thread holds at a fork would be held for ever in the child, where that thread is not.
_alive: weakref.WeakSet[Generation] = weakref.WeakSet()


def _renew_locks() -> None:
    for generation in _alive:
        generation.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _runs(ids: NDArray[np.int32], token: int | None) -> tuple[list[int], list[int]]:
    """Starts and lengths of the runs of `token`."""
    if token is None:
        return [], []
    edges = np.flatnonzero(np.diff((ids == token).astype(np.int8), prepend=0, append=0))
    return edges[::2].tolist(), (edges[1::2] - edges[::2]).tolist()
