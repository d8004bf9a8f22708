"""Many answers at once: whoever waits for a token takes the steps that all of them share."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from threading import get_ident
from time import perf_counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.base.errors import CacheFullError, Qwen2VLError
from qwen2vl_q.engine.stats import FinishReason, GenerationStats, peak_memory_bytes
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.vision.image_processor import ProcessedImage

# Called with a stage ("load", "image", "prefill") and how far it is, at most every 50 ms. An exception
# raised in it cancels the call.
Progress: TypeAlias = "Callable[[str, int, int], None]"
# A picture's embeddings, and whether they had to be computed.
Embed: TypeAlias = "Callable[[ProcessedImage, Callable[[int, int], None]], tuple[NDArray[np.float32], bool]]"

_AHEAD = 8  # tokens of a stream that wait for whoever reads it; then the others go on without it
_MOST_RUNNING = 64
_CHUNK = 128  # rows of prompts beside streams: so long does a token wait for them at most
_WORTH_WAITING = 64  # cells that another request is about to compute

_is_over = attrgetter("over")
_IN_A_CALLBACK = "a call of the model is under way in this thread: its callback cannot make another"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt, checked against model and context."""

    prompt: _native.Prompt
    images: list[ProcessedImage]
    ends: list[int]  # of each image, one past its last pad token
    counts: list[int]  # of each image, its pad tokens


class _Stopped(Exception):
    """A callback has raised; its request has the error."""


class Request:
    """One answer on its way: tokens come to it from whichever thread takes the steps."""

    def __init__(
        self,
        prepared: Prepared,
        sampler: _native.Sampler,
        limit: int,
        cut: FinishReason,
        text: TextStream,
        progress: Progress | None = None,
        ahead: int = _AHEAD,
    ) -> None:
        """limit: tokens at most; cut: the reason of the end where they are reached. text: tells which token
        is the last. progress: called on the thread that takes the step. ahead: tokens that may wait here."""
        self.prepared = prepared
        self.sampler = sampler
        self.limit = limit
        self.cut: FinishReason = cut
        self.text = text
        self.progress = progress
        self.ahead = ahead
        self.submitted = False
        self.over = False  # nothing more will be computed
        self.error: BaseException | None = None
        self.tokens: deque[tuple[int, str]] = deque()
        self.state: _native.SequenceState | None = None
        self.embeddings: list[NDArray[np.float32] | None] = []
        self.missing: list[int] = []  # images that have to be encoded first
        self.drawn = 0
        # GenerationStats
        self.image_tokens = self.reused_tokens = 0
        self.encode_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        self.finish_reason: FinishReason = ""

    @property
    def ready(self) -> bool:
        return bool(self.tokens) or self.over

    @property
    def stalled(self) -> bool:
        return len(self.tokens) >= self.ahead

    @property
    def live(self) -> _native.SequenceState:
        """Its cells, as long as it is under way."""
        assert self.state is not None
        return self.state

    def take(self) -> tuple[int, str] | None:
        """The next token and its text, None at the end; the error that has ended it. Only when ready."""
        if self.tokens:
            return self.tokens.popleft()
        if self.error is not None:
            raise self.error
        return None

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.over = True


class Scheduler:
    """Runs the requests of one model. It has no thread: of the threads that wait for tokens one at a time
    takes a step, which gives every request that is under way a token or a piece of its prompt.
    """

    def __init__(self, native: _native.Model, n_ctx: int, embed: Embed) -> None:
        """embed: the embeddings of a picture; called by one thread at a time."""
        self._native = native
        self._n_ctx = n_ctx
        self._embed = embed
        self._max_rows = native.max_batch_rows
        self._lock = threading.RLock()  # of what follows; never held while something is computed
        self._changed = threading.Condition(self._lock)
        self._sleepers = 0  # threads that wait for a change
        self._stepper: int | None = None  # the thread that holds the turn
        self._interrupted = False  # a step: tokens may be left to draw
        self._waiting: list[Request] = []
        self._running: list[Request] = []  # in the order of their beginning
        self._latest: Request | None = None
        self._ended: Qwen2VLError | None = None
        _alive.add(self)

    # --- for threads that want tokens ---

    def submit(self, request: Request) -> None:
        """Lets a request wait for its first step."""
        with self._lock:
            if self._stepper == get_ident():
                raise Qwen2VLError(_IN_A_CALLBACK)
            if self._ended is not None:
                raise self._ended
            request.submitted = True
            self._latest = request
            self._waiting.append(request)

    def next(self, request: Request) -> tuple[int, str] | None:
        """The request's next token and its text; None at its end. Raises what has ended it."""
        if not request.submitted:
            self.submit(request)
        while not request.tokens:
            if not self._take_turn(request):
                return request.take()
            try:
                self._step()
            except BaseException as error:  # of this thread alone, such as Ctrl-C
                self._interrupted = True
                request.fail(error)
            finally:
                self._end_turn()
        return request.tokens.popleft()

    def close(self, request: Request) -> None:
        """Ends a request, wherever it is; its pages are given back now or after the step that is taken."""
        request.over = True
        with self._lock:
            if self._stepper is None:
                self._drop_ended()
            self._wake()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No step is taken meanwhile."""
        self._take_turn()
        try:
            yield
        finally:
            self._end_turn()

    def _take_turn(self, request: Request | None = None) -> bool:
        """Waits until nobody holds the turn and takes it; False, without it, once `request` is ready."""
        me = get_ident()
        with self._lock:
            while request is None or not (request.tokens or request.over):
                if self._stepper is None:
                    self._stepper = me
                    return True
                if self._stepper == me:
                    raise Qwen2VLError(_IN_A_CALLBACK)
                self._sleepers += 1
                try:
                    self._changed.wait()
                finally:
                    self._sleepers -= 1
        return False

    def _end_turn(self) -> None:
        with self._lock:
            self._drop_ended()
            self._stepper = None
            self._wake()

    def _wake(self) -> None:
        if self._sleepers:
            self._changed.notify_all()

    def _drop_ended(self) -> None:
        for requests in (self._running, self._waiting):
            if any(map(_is_over, requests)):
                for r in list(filter(_is_over, requests)):
                    requests.remove(r)
                    r.state = None
                    r.embeddings = []

    def end_all(self, error: Qwen2VLError) -> None:
        """Every request ends with `error`, and those to come."""
        with self.turn():
            self._ended = error
            for request in self._running + self._waiting:
                request.fail(error)

    def forget(self) -> None:
        """Nothing computed so far is found again. For whoever holds the turn."""
        self._native.forget()

    @property
    def stats(self) -> GenerationStats:
        """Of the latest request; may be asked for while it is computed."""
        r = self._latest
        if r is None:
            return GenerationStats(kv_bytes=self._native.cache_bytes, peak_memory_bytes=peak_memory_bytes())
        return GenerationStats(
            image_tokens=r.image_tokens,
            encode_seconds=r.encode_seconds,
            prompt_tokens=len(r.prepared.prompt),
            reused_tokens=r.reused_tokens,
            prefill_seconds=r.prefill_seconds,
            generated_tokens=r.drawn,
            decode_seconds=r.decode_seconds,
            finish_reason=r.finish_reason,
            kv_bytes=self._native.cache_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )

    # --- for the thread that holds the turn ---

    def _step(self) -> None:
        """A picture that somebody waits for; then tokens and pieces of prompts, in one forward pass. Ctrl-C
        may come between any two lines: the next step goes on."""
        try:
            if self._interrupted:
                self._interrupted = False
                for r in self._running:
                    if not (r.over or r.missing or r.live.waiting):
                        self._draw(r)
            if self._waiting:
                self._admit()
            self._compute()
        except _Stopped:
            pass
        except CacheFullError as error:
            [r for r in self._running if not r.over][-1].fail(error)

    def _admit(self) -> None:
        for r in list(self._waiting):
            active = [other for other in self._running if not other.over]
            if sum(not other.stalled for other in active) >= _MOST_RUNNING:
                return
            if r.over or any(not other.drawn and _worth_waiting(r, other) for other in active):
                continue
            try:
                r.state = _native.SequenceState(self._native, self._n_ctx)
                r.reused_tokens = r.state.adopt(r.prepared.prompt)
                r.embeddings = [None] * len(r.prepared.images)
                r.missing = [i for i, end in enumerate(r.prepared.ends) if end > r.reused_tokens]
                if not r.missing:
                    r.state.begin(r.prepared.prompt, r.embeddings)
            except Exception as error:
                r.fail(error)
                continue
            if r not in self._running:
                self._running.append(r)
            self._waiting.remove(r)

    def _encode(self, r: Request) -> None:
        """The first picture that is missing."""
        index = r.missing[0]
        start = perf_counter()
        try:
            r.embeddings[index], fresh = self._embed(r.prepared.images[index], partial(_report, r, "image"))
            if fresh:
                r.image_tokens += r.prepared.counts[index]
                r.encode_seconds += perf_counter() - start
            if len(r.missing) == 1:
                r.live.begin(r.prepared.prompt, r.embeddings)
            del r.missing[0]
        except (_Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            r.fail(error)

    def _compute(self) -> None:
        """The next tokens of streams that somebody reads, and pieces of prompts."""
        streams, prompts, seeing = [], [], []
        for r in self._running:
            if r.over:
                continue
            if r.drawn:
                if len(r.tokens) < r.ahead:
                    streams.append(r)
            elif r.missing:
                seeing.append(r)
            else:
                prompts.append(r)
        if seeing:
            self._encode(seeing[0])
        streams = streams[: self._max_rows]
        pieces = self._pieces(prompts, len(streams)) if prompts else []
        if not (streams or pieces):
            return
        start = perf_counter()
        _native.step(
            [r.live for r in streams] + [r.live for r, _, _ in pieces],
            [1] * len(streams) + [rows for _, rows, _ in pieces],
            _prefill_report(pieces) if pieces else None,
        )
        end = perf_counter()
        for r in streams:
            r.decode_seconds += end - start
            self._draw(r)
        for r, _, last in pieces:
            r.prefill_seconds += end - start
            if last:
                self._draw(r)

    def _pieces(self, prompts: Sequence[Request], streams: int) -> list[tuple[Request, int, bool]]:
        """How many rows of each prompt are computed next, and whether they are its last: equal shares of a
        step, so that a short one does not wait for a long one."""
        room = self._max_rows - streams
        if streams:
            room = min(room, _CHUNK)
        pieces = []
        waiting = sorted(((r.live.waiting, i) for i, r in enumerate(prompts)))
        for left, (rows, i) in zip(range(len(waiting), 0, -1), waiting, strict=True):
            share = min(rows, room // left)
            if share:
                pieces.append((prompts[i], share, share == rows))
                room -= share
        return pieces

    def _draw(self, r: Request) -> None:
        """The token behind the cells of a request; the next step computes it."""
        start = perf_counter()
        try:
            state = r.live
            token = state.sample(r.sampler)  # where a device's work ends
            taken = perf_counter() - start
            piece = r.text.push(token)
            if r.text.finished or r.drawn + 1 == r.limit:
                r.finish_reason = "stop" if r.text.finished else r.cut
                r.over = True
            else:
                state.push(token)
        except Exception as error:
            r.fail(error)
            return
        if r.drawn:
            r.decode_seconds += taken
        else:
            r.prefill_seconds += taken
        r.drawn += 1
        r.tokens.append((token, piece))


def _worth_waiting(r: Request, other: Request) -> bool:
    """Whether `other` is about to compute a good part of what `r` begins with."""
    common = min(r.prepared.prompt.common_prefix(other.prepared.prompt), len(r.prepared.prompt) - 1)
    return common - other.live.n_cells >= _WORTH_WAITING


def _report(r: Request, stage: str, done: int, total: int) -> None:
    if r.progress is None:
        return
    try:
        r.progress(stage, done, total)
    except BaseException as error:
        r.fail(error)
        raise _Stopped from None


def _prefill_report(pieces: Sequence[tuple[Request, int, bool]]) -> Callable[[int, int], None] | None:
    """Tells each request how far its prompt is: what was found is no part of it."""
    told = [
        (r, rows, r.live.n_cells - r.reused_tokens, len(r.prepared.prompt) - r.reused_tokens)
        for r, rows, _ in pieces
        if r.progress is not None
    ]
    if not told:
        return None

    def report(layer: int, layers: int) -> None:
        for r, rows, done, total in told:
            if layer < layers or done + rows == total:
                _report(r, "prefill", done + rows * layer // layers, total)

    return report


# What another thread holds at a fork would be held for ever in the child, where that thread is not.
_alive: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _renew_locks() -> None:
    for scheduler in _alive:
        scheduler._lock = threading.RLock()
        scheduler._changed = threading.Condition(scheduler._lock)
        scheduler._sleepers = 0
        if scheduler._stepper != get_ident():
            scheduler._stepper = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
