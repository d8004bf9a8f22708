"""Prompts on a native model: images and tokens in, tokens out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.engine.config import Qwen2VLConfig
from qwen2vl_q.engine.embedding_cache import EmbeddingCache
from qwen2vl_q.engine.scheduler import Prepared, Progress, Request, Scheduler
from qwen2vl_q.engine.stats import FinishReason, GenerationStats
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.vision.image_processor import ImageProcessor, ProcessedImage

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"

IMAGE_CACHE_BYTES = 256 * 1024 * 1024  # some fifty photos of the 2B model


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """The native module's kind of callback for one stage."""
    return None if progress is None else partial(progress, name)


class _Pictures:
    """Encodes pictures once. Whoever uses it holds the scheduler's turn."""

    def __init__(self, native: _native.Model, processor: ImageProcessor) -> None:
        self._native = native
        self._processor = processor
        self.forget()

    def forget(self) -> None:
        self._embeddings = EmbeddingCache(IMAGE_CACHE_BYTES)

    def embed(
        self, image: ProcessedImage, report: Callable[[int, int], None] | None
    ) -> tuple[NDArray[np.float32], bool]:
        """float32 [n_tokens, hidden_size], read-only where it is kept for the next time; and whether it is
        new."""
        found = self._embeddings.get(image.key)
        if found is not None:
            return found, False
        found = self._native.encode_pixels(image.pixels, self._processor.levels(), image.grid_thw, report)
        self._embeddings.put(image.key, found)
        return found, True


class Generation:
    """Makes requests of prompts, and runs them."""

    def __init__(
        self, native: _native.Model, config: Qwen2VLConfig, processor: ImageProcessor, n_ctx: int
    ) -> None:
        self._native = native
        self._config = config
        self._processor = processor
        self._n_ctx = n_ctx
        self._pictures = _Pictures(native, processor)
        self.scheduler = Scheduler(native, n_ctx, self._pictures.embed)

    def reset(self) -> None:
        """Forgets what has been computed, and the embeddings."""
        with self.scheduler.turn():
            self._pictures.forget()
            self.scheduler.forget()

    @property
    def stats(self) -> GenerationStats:
        """Of the latest call; may be asked for while it computes."""
        return self.scheduler.stats

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
        return Prepared(prompt, images, [s + n for s, n in zip(starts, lengths, strict=True)], lengths)

    def embed(self, image: ProcessedImage, progress: Progress | None) -> NDArray[np.float32]:
        """float32 [n_tokens, hidden_size]; read-only where it is kept for the next time."""
        with self.scheduler.turn():
            return self._pictures.embed(image, stage(progress, "image"))[0]

    def logits(self, prepared: Prepared, progress: Progress | None) -> NDArray[np.float32]:
        """Every row's, in cells of their own."""
        embeddings = [self.embed(image, progress) for image in prepared.images]
        with self.scheduler.turn():
            sequence = _native.SequenceState(self._native, self._n_ctx)
            return sequence.prefill_logits(prepared.prompt, embeddings, stage(progress, "prefill"))

    def request(
        self,
        prepared: Prepared,
        sampler: _native.Sampler,
        max_new_tokens: int,
        text: TextStream,
        progress: Progress | None,
    ) -> Request:
        """New tokens, which begin to come when they are first asked for."""
        # The last token drawn takes no cell.
        room = self._n_ctx - len(prepared.prompt) + 1
        cut: FinishReason = "context" if room < max_new_tokens else "length"
        return Request(prepared, sampler, min(max_new_tokens, room), cut, text, progress)

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """The whole texts of requests that are computed together."""
        try:
            for request in requests:
                request.ahead = request.limit
                self.scheduler.submit(request)
            return ["".join(self.texts(request)) for request in requests]
        finally:
            for request in requests:
                self.scheduler.close(request)

    # Streams of a request, which ends where they are closed.

    def tokens(self, request: Request) -> Iterator[int]:
        try:
            while (drawn := self.scheduler.next(request)) is not None:
                yield drawn[0]
        finally:
            self.scheduler.close(request)

    def texts(self, request: Request) -> Iterator[str]:
        try:
            while (drawn := self.scheduler.next(request)) is not None:
                if drawn[1]:
                    yield drawn[1]
        finally:
            self.scheduler.close(request)
        if rest := request.text.finish():
            yield rest

    async def tokens_async(self, request: Request) -> AsyncIterator[int]:
        try:
            while (drawn := await self._next_async(request)) is not None:
                yield drawn[0]
        finally:
            self.scheduler.close(request)

    async def texts_async(self, request: Request) -> AsyncIterator[str]:
        try:
            while (drawn := await self._next_async(request)) is not None:
                if drawn[1]:
                    yield drawn[1]
        finally:
            self.scheduler.close(request)
        if rest := request.text.finish():
            yield rest

    async def answer_async(self, request: Request) -> str:
        return "".join([piece async for piece in self.texts_async(request)])

    async def _next_async(self, request: Request) -> tuple[int, str] | None:
        """Another thread waits and computes."""
        if not request.submitted:
            self.scheduler.submit(request)
        if request.ready:
            return request.take()
        return await asyncio.to_thread(self.scheduler.next, request)


def _runs(ids: NDArray[np.int32], token: int | None) -> tuple[list[int], list[int]]:
    """Starts and lengths of the runs of `token`."""
    if token is None:
        return [], []
    edges = np.flatnonzero(np.diff((ids == token).astype(np.int8), prepend=0, append=0))
    return edges[::2].tolist(), (edges[1::2] - edges[::2]).tolist()
