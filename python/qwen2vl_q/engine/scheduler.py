"""Many answers at once: whoever waits for a token takes the steps that all of them share."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from threading import get_ident
from time import perf_counter, sleep

from qwen2vl_q import _native
from qwen2vl_q.base.errors import CacheFullError, Qwen2VLError
from qwen2vl_q.engine.pictures import Pictures
from qwen2vl_q.engine.request import Drawn, Request
from qwen2vl_q.engine.stats import GenerationStats, peak_memory_bytes
from qwen2vl_q.vision.image_processor import ProcessedImage

_MOST_RUNNING = 64
_SLICE = 0.1  # seconds of a picture between two steps: so long does a token wait for it, about
_CHUNK = 128  # rows of prompts beside streams: so long does a token wait for them at most
_PATIENCE = 1.0  # seconds that a full cache's streams may stay unread before they count as left
_WORTH_WAITING = 64  # cells that another request is about to compute
_GUESSED_ROWS = 16  # of a step, those of drawn tokens included; streams have equal shares

_is_over = attrgetter("over")
_IN_A_CALLBACK = "a call of the model is under way in this thread: its callback cannot make another"


class _Stopped(BaseException):
    """A callback has raised; its request has the error."""


class Scheduler:
    """Runs the requests of one model. It has no thread: of the threads that wait for tokens one at a time
    takes a step, which gives every request that is under way a token or a piece of its prompt.
    """

    def __init__(self, native: _native.Model, n_ctx: int, pictures: Pictures) -> None:
        self._native = native
        self._n_ctx = n_ctx
        self._pictures = pictures
        self._max_rows = native.max_batch_rows
        self._can_guess = native.can_guess
        self._lock = threading.RLock()  # of what follows; never held while something is computed
        self._changed = threading.Condition(self._lock)
        self._sleepers = 0  # threads that wait for a change
        self._pressing = 0  # of them, those that want the turn for something else than steps
        self._stepper: int | None = None  # the thread that holds the turn
        self._interrupted = False  # a step: tokens may be left to draw
        self._full = False  # the cache: who waits does so until a running request ends
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

    def next(self, request: Request) -> Drawn | None:
        """The request's next token; None at its end. Raises what has ended it."""
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
        request.error = None  # its traceback leads to frames that hold the request: a circle keeps them all
        with self._lock:
            if self._stepper is None:
                self._drop_ended()
            self._wake()

    def encode(self, image: ProcessedImage, report: Callable[[int, int], None] | None) -> _native.Embeddings:
        """A picture's embeddings; between slices of the work others get their steps."""
        encoding = None
        while encoding is None or encoding.embeddings is None:
            self._take_turn()
            try:
                if self._ended is not None:
                    raise self._ended
                encoding = encoding or self._pictures.encoding(image)
                if not encoding.advance(_SLICE, report):
                    self._step()
            except BaseException:
                self._interrupted = True
                raise
            finally:
                self._end_turn()
        return encoding.embeddings

    @contextmanager
    def turn(self) -> Iterator[None]:
        """No step is taken meanwhile."""
        self._take_turn()
        try:
            yield
        finally:
            self._end_turn()

    def _take_turn(self, request: Request | None = None) -> bool:
        """Waits until nobody holds the turn and takes it; False, without it, once `request` is ready. Who
        wants it for something else than steps comes first."""
        with self._lock:
            if request is not None:
                return self._wait_for_turn(request)
            self._pressing += 1
            try:
                return self._wait_for_turn(request)
            finally:
                self._pressing -= 1
                self._wake()

    def _wait_for_turn(self, request: Request | None) -> bool:
        me = get_ident()
        while request is None or not (request.tokens or request.over):
            if self._stepper is None and (request is None or not self._pressing):
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
                self._full = False
                for r in list(filter(_is_over, requests)):
                    requests.remove(r)
                    r.state = None
                    r.pictures = []

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
        if self._latest is None:
            return GenerationStats(kv_bytes=self._native.cache_bytes, peak_memory_bytes=peak_memory_bytes())
        return self.stats_of(self._latest)

    def stats_of(self, request: Request) -> GenerationStats:
        return request.stats(self._native.cache_bytes)

    # --- for the thread that holds the turn ---

    def _step(self) -> None:
        """A picture that somebody waits for; then tokens and pieces of prompts, in one forward pass. Ctrl-C
        may come between any two lines: the next step goes on."""
        try:
            if self._interrupted:
                self._interrupted = False
                for r in self._running:
                    if r.begun and not (r.over or r.live.waiting):
                        self._draw(r)
            if self._waiting:
                self._admit()
            self._compute()
        except _Stopped:
            pass
        except CacheFullError as error:
            self._make_room(error)

    def _make_room(self, error: CacheFullError) -> None:
        """The newest request waits until another has ended; where none of them goes on, it ends."""
        active = [r for r in self._running if not r.over]
        newest = active.pop()
        if not _go_on(active):
            newest.fail(error)
            return
        self._waiting.insert(0, newest)
        newest.restart()
        self._running.remove(newest)
        self._full = True

    def _admit(self) -> None:
        for r in list(self._waiting):
            if not r.pictures:  # what another has encoded of them is not dropped with it
                r.pictures = list(map(self._pictures.encoding, r.prepared.images))
            active = [other for other in self._running if not other.over]
            going_on = sum(not other.stalled for other in active)
            if going_on >= _MOST_RUNNING or (self._full and going_on):
                return
            if r.over or any(not other.decoding and _worth_waiting(r, other) for other in active):
                continue
            try:
                r.restart()
                r.state = _native.SequenceState(self._native, self._n_ctx)
                r.reused_tokens = r.state.adopt(r.prepared.prompt)
                r.found = sum(end <= r.reused_tokens for _, end in r.prepared.prompt.runs)
            except Exception as error:
                r.fail(error)
                continue
            if r not in self._running:
                self._running.append(r)
            self._waiting.remove(r)

    def _begin(self, r: Request) -> None:
        """Lets its prompt wait for steps, once all pictures have been encoded."""
        if r.next_picture is not None:
            return
        try:
            rows = [picture.embeddings for picture in r.pictures]
            r.live.begin(r.prepared.prompt, [None] * r.found + rows[r.found :])
            r.begun = True
            r.pictures = []
        except Exception as error:
            r.fail(error)

    def _encode(self, r: Request) -> None:
        """A slice of the first picture that it waits for."""
        i = r.next_picture
        assert i is not None
        start = perf_counter()
        try:
            if r.pictures[i].advance(_SLICE, partial(_report, r, "image")):
                first, end = r.prepared.prompt.runs[i]
                r.image_tokens += end - first
        except Exception as error:
            r.fail(error)
        finally:
            r.encode_seconds += perf_counter() - start

    def _compute(self) -> None:
        """The next tokens of streams that somebody reads, and pieces of prompts."""
        streams, prompts, seeing = [], [], []
        for r in self._running:
            if not (r.over or r.begun):
                self._begin(r)
            if r.over:
                continue
            if not r.begun:
                seeing.append(r)
            elif not r.decoding:
                prompts.append(r)
            elif not r.stalled:
                streams.append(r)
        if seeing:
            self._encode(seeing[0])
        streams = streams[: self._max_rows]
        guessed = self._guess(streams)
        pieces = self._pieces(prompts, len(streams), guessed) if prompts else []
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

    def _guess(self, streams: Sequence[Request]) -> int:
        """What is likely to follow the streams' tokens; of how many tokens."""
        share = _GUESSED_ROWS // max(1, len(streams)) - 1
        if not self._can_guess or share < 1:
            return 0
        total = 0
        for r in streams:
            if r.fed < r.drawn:  # it has begun anew
                total += r.live.guess(r.history[r.fed : r.fed + share])
                continue
            most = min(share, r.limit - r.drawn - 1)
            if not r.guessing.most or most < 1:
                continue
            try:
                tokens = r.forced()[:most] or r.live.look_up(min(most, r.guessing.length))
                made = r.live.guess(tokens) if tokens else 0
            except Exception as error:
                r.fail(error)
                continue
            r.guessing.make(made)
            total += made
        return total

    def _pieces(
        self, prompts: Sequence[Request], streams: int, guessed: int
    ) -> list[tuple[Request, int, bool]]:
        """How many rows of each prompt are computed next, and whether they are its last: equal shares of a
        step, so that a short one does not wait for a long one."""
        room = self._max_rows - streams - guessed
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
        """The token behind the cells of a request; the next step computes it. Where that has been done, since
        it was guessed, the token behind it, too."""
        guesses = -1
        while not (r.over or r.live.waiting):
            self._draw_one(r)
            guesses += 1
        r.guessing.learn(guesses)

    def _draw_one(self, r: Request) -> None:
        start = perf_counter()
        try:
            if r.fed < r.drawn:  # it has begun anew
                r.live.push(r.history[r.fed])
                r.fed += 1
                r.decoding = True
                return
            allowed = None if r.constraint is None else r.constraint.allowed()
            token = r.live.sample(r.sampler, allowed)  # where a device's work ends
            scored = None if r.top_logprobs is None else r.live.log_probabilities(token, r.top_logprobs)
            taken = perf_counter() - start
            if r.constraint is not None:
                r.constraint.accept(token)
            piece = r.text.push(token)
            if r.text.finished or r.drawn + 1 == r.limit:
                r.finish_reason = "stop" if r.text.finished else r.cut
                r.over = True
            else:
                r.live.push(token)
        except Exception as error:
            r.fail(error)
            return
        if r.decoding:
            r.decode_seconds += taken
        else:
            r.prefill_seconds += taken
        r.decoding = True
        r.history.append(token)
        r.fed += 1
        r.tokens.append(Drawn(token, piece, scored))


def _go_on(requests: Sequence[Request]) -> bool:
    """Whether somebody reads one of them, now or soon."""
    end = perf_counter() + _PATIENCE
    while all(r.stalled for r in requests):
        if not requests or perf_counter() > end:
            return False
        sleep(0.01)
    return True


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
        scheduler._sleepers = scheduler._pressing = 0
        if scheduler._stepper != get_ident():
            scheduler._stepper = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
