"""Prompts on a native model: images and tokens in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.chat.tools import CallReader
from qwen2vl_q.engine.answer import Answer, next_async
from qwen2vl_q.engine.config import Qwen2VLConfig
from qwen2vl_q.engine.pictures import Pictures
from qwen2vl_q.engine.request import Constraint, Prepared, Progress, Request, require_constraint
from qwen2vl_q.engine.scheduler import Scheduler
from qwen2vl_q.engine.stats import FinishReason, GenerationStats
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.text.tokenizer import Tokenizer
from qwen2vl_q.vision.image_processor import ImageProcessor, ProcessedImage

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"


def stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """The native module's kind of callback for one stage."""
    return None if progress is None else partial(progress, name)


class Generation:
    """Makes requests of prompts, and runs them."""

    def __init__(
        self, native: _native.Model, config: Qwen2VLConfig, processor: ImageProcessor, n_ctx: int
    ) -> None:
        self._native = native
        self._config = config
        self._processor = processor
        self._n_ctx = n_ctx
        self._pictures = Pictures(native, processor)
        self.scheduler = Scheduler(native, n_ctx, self._pictures)

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

    def prepare(self, token_ids: TokenIds, images: list[ProcessedImage]) -> Prepared:
        """ValueError for what is no prompt with these images: errors as of `_native.Prompt`."""
        items = [(image.grid_thw, image.key) for image in images]
        return Prepared(_native.Prompt(self._native, token_ids, items, self._n_ctx), images)

    def positions(self, token_ids: TokenIds, grids: Iterable[tuple[int, int, int]]) -> NDArray[np.int64]:
        return _native.Prompt(self._native, token_ids, [(grid, bytes(16)) for grid in grids]).positions

    def embed(self, image: ProcessedImage, progress: Progress | None) -> _native.Embeddings:
        return self.scheduler.encode(image, stage(progress, "image"))

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
        progress: Progress | None = None,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
        most_guessed: int = 0,
    ) -> Request:
        """New tokens, which begin to come when they are first asked for."""
        require_constraint(constraint)
        # The last token drawn takes no cell.
        room = self._n_ctx - len(prepared.prompt) + 1
        cut: FinishReason = "context" if room < max_new_tokens else "length"
        limit = min(max_new_tokens, room)
        return Request(prepared, sampler, limit, cut, text, progress, constraint, top_logprobs, most_guessed)

    def answer(self, request: Request, tokenizer: Tokenizer, calls: CallReader | None = None) -> Answer:
        return Answer(self.scheduler, request, tokenizer, calls)

    # Streams of a request, which ends where they are closed.

    def tokens(self, request: Request) -> Iterator[int]:
        try:
            while (drawn := self.scheduler.next(request)) is not None:
                yield drawn.token
        finally:
            self.scheduler.close(request)

    async def tokens_async(self, request: Request) -> AsyncIterator[int]:
        try:
            while (drawn := await next_async(self.scheduler, request)) is not None:
                yield drawn.token
        finally:
            self.scheduler.close(request)
