"""Who may run, and who waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from qwen2vl_q.serve.errors import HttpError
from qwen2vl_q.serve.limits import Limits


class Admission:
    """So many answers are computed together, so many requests wait, in their order; more come again later."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.running = 0  # answers
        self.held_bytes = 0  # of bodies

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def place(self, answers: int) -> AsyncIterator[None]:
        """HttpError 400 for more answers than may ever run, 429 where too many wait."""
        if answers > self._limits.answers:
            raise HttpError(400, f"n: expected at most {self._limits.answers} answers", "n")
        if self._waiting or self.running + answers > self._limits.answers:
            await self._wait(answers)
        else:
            self.running += answers
        try:
            yield
        finally:
            self.running -= answers
            self._let_in()

    @contextmanager
    def memory(self) -> Iterator[Memory]:
        """Of a request's body, until its pictures have been read."""
        held = Memory(self, self._limits.queue_bytes)
        try:
            yield held
        finally:
            held.release()

    async def _wait(self, answers: int) -> None:
        if len(self._waiting) >= self._limits.queued:
            raise HttpError(429, f"{len(self._waiting)} requests are waiting", headers={"Retry-After": "1"})
        turn = asyncio.get_running_loop().create_future()
        entry = (answers, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            with suppress(ValueError):
                self._waiting.remove(entry)
            if turn.done() and not turn.cancelled():  # let in, and gone
                self.running -= answers
            self._let_in()
            raise

    def _let_in(self) -> None:
        while self._waiting and self.running + self._waiting[0][0] <= self._limits.answers:
            answers, turn = self._waiting.popleft()
            if not turn.done():
                self.running += answers
                turn.set_result(None)


class Memory:
    def __init__(self, admission: Admission, most: int) -> None:
        self._admission = admission
        self._most = most
        self._bytes = 0

    def take(self, n_bytes: int) -> None:
        """HttpError 429 where all bodies together would be too large."""
        if self._admission.held_bytes + n_bytes > self._most:
            raise HttpError(429, "too many large requests are waiting", headers={"Retry-After": "1"})
        self._admission.held_bytes += n_bytes
        self._bytes += n_bytes

    def release(self) -> None:
        self._admission.held_bytes -= self._bytes
        self._bytes = 0
