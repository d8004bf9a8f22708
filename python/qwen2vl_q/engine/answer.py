"""An answer on its way: its text and what is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from qwen2vl_q.chat.messages import ToolCall
from qwen2vl_q.chat.tools import CallReader
from qwen2vl_q.engine.request import Drawn, LogProbabilities, Request
from qwen2vl_q.engine.scheduler import Scheduler
from qwen2vl_q.engine.stats import FinishReason, GenerationStats
from qwen2vl_q.text.tokenizer import Tokenizer

_Bytes: TypeAlias = bytes


class TokenLogprob(NamedTuple):
    """A token, and the natural logarithm of what the model held probable: of its logits as they are, before
    penalties, biases, constraints and temperature."""

    token: int
    bytes: _Bytes  # of its text, which need not be whole characters; a special token's name
    logprob: float
    top: tuple[TokenLogprob, ...] = ()  # the likeliest in its place

    @property
    def text(self) -> str:
        return self.bytes.decode("utf-8", errors="replace")


class Part(NamedTuple):
    """What has come of an answer since the part before."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer:
    """Iterates over its parts, with `for` or `async for`; `await answer` and `complete()` compute the rest.

    Its attributes tell what has come so far. Where it is closed, dropped, or its task cancelled, it ends.
    """

    def __init__(
        self, scheduler: Scheduler, request: Request, tokenizer: Tokenizer, calls: CallReader | None = None
    ) -> None:
        """calls: takes tool calls out of the text."""
        self._scheduler = scheduler
        self._request = request
        self._tokenizer = tokenizer
        self._calls = calls
        self._over = False
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.tool_calls: list[ToolCall] = []

    @property
    def text(self) -> str:
        """Without the tool calls."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Of each token of the text, the calls and the stop string, where they were asked for; not of the
        token that ends the answer."""
        return None if self._request.top_logprobs is None else self._logprobs

    @property
    def finish_reason(self) -> FinishReason | Literal["tool_calls"]:
        """ "": it has not ended; "stop", "tool_calls"; "length": max_new_tokens; "context": n_ctx."""
        reason = self._request.finish_reason if self._over else ""
        return "tool_calls" if reason == "stop" and self.tool_calls else reason

    @property
    def stats(self) -> GenerationStats:
        """What it has taken."""
        return self._scheduler.stats_of(self._request)

    @property
    def message(self) -> dict[str, Any]:
        """As the next prompt's messages hold it."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.for_message() for call in self.tool_calls]
        return message

    def __repr__(self) -> str:
        return f"Answer({self.text!r}, finish_reason={self.finish_reason!r})"

    def __iter__(self) -> Iterator[Part]:
        return self

    def __aiter__(self) -> AsyncIterator[Part]:
        return self

    def __next__(self) -> Part:
        try:
            while not self._over:
                if part := self._take(self._scheduler.next(self._request)):
                    return part
        except BaseException:
            self.close()
            raise
        raise StopIteration

    async def __anext__(self) -> Part:
        try:
            while not self._over:
                if part := self._take(await next_async(self._scheduler, self._request)):
                    return part
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._completed().__await__()

    async def _completed(self) -> Answer:
        async for _ in self:
            pass
        return self

    def complete(self) -> Answer:
        for _ in self:
            pass
        return self

    def close(self) -> None:
        """Ends it where it is."""
        self._over = True
        self._scheduler.close(self._request)

    def __del__(self) -> None:
        if not self._over and self._request.submitted:
            self.close()

    def _take(self, drawn: Drawn | None) -> Part | None:
        """What is new; None where nothing can be told yet."""
        if drawn is None:
            self.close()
            return self._told(self._request.text.finish(), ())
        if drawn.scored is None or self._request.text.is_end(drawn.token):
            return self._told(drawn.text, ())
        logprobs = (self._scored(drawn.token, drawn.scored),)
        self._logprobs += logprobs
        return self._told(drawn.text, logprobs)

    def _told(self, text: str, logprobs: tuple[TokenLogprob, ...]) -> Part | None:
        calls: tuple[ToolCall, ...] = ()
        if self._calls is not None:
            text, calls = self._calls.push(text)
            if self._over:
                text += self._calls.finish()
            self.tool_calls += calls
        if text:
            self._texts.append(text)
        return Part(text, calls, logprobs) if text or calls or logprobs else None

    def _scored(self, token: int, scored: LogProbabilities) -> TokenLogprob:
        value, likeliest = scored
        top = tuple(TokenLogprob(t, self._tokenizer.token_bytes(t), v) for t, v in likeliest)
        return TokenLogprob(token, self._tokenizer.token_bytes(token), value, top)


async def next_async(scheduler: Scheduler, request: Request) -> Drawn | None:
    """`scheduler.next`; another thread waits and computes."""
    if not request.submitted:
        scheduler.submit(request)
    if request.ready:
        return request.take()
    return await asyncio.to_thread(scheduler.next, request)


# --- of answers, their texts ---


def texts(answer: Answer) -> Iterator[str]:
    try:
        for part in answer:
            if part.text:
                yield part.text
    finally:
        answer.close()


async def texts_async(answer: Answer) -> AsyncIterator[str]:
    try:
        async for part in answer:
            if part.text:
                yield part.text
    finally:
        answer.close()


def complete(answers: Sequence[Answer]) -> None:
    """All of them, computed together."""
    try:
        _submit(answers)
        for answer in answers:
            answer.complete()
    finally:
        _close(answers)


async def complete_async(answers: Sequence[Answer]) -> None:
    try:
        _submit(answers)
        for answer in answers:
            await answer
    finally:
        _close(answers)


def _submit(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer._request.ahead = answer._request.limit
        answer._scheduler.submit(answer._request)


def _close(answers: Iterable[Answer]) -> None:
    for answer in answers:
        answer.close()
