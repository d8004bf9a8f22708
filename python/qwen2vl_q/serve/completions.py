"""Completions: from a request's body to its answer, whole or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from qwen2vl_q import _native
from qwen2vl_q.engine.answer import Answer, Part
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve.admission import Admission, Memory
from qwen2vl_q.serve.body import read_body
from qwen2vl_q.serve.errors import CLIENT_GONE, HttpError, as_http, body_of, for_log, forget
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.serve.log import Record
from qwen2vl_q.serve.metrics import Metrics
from qwen2vl_q.serve.pictures import PictureReader, has_clips
from qwen2vl_q.serve.replies import ChatReply, Reply, TextReply, event
from qwen2vl_q.serve.schema import Asked, ChatCompletion, Completion, parse

_PREPARING = 2  # requests whose pictures are decoded at a time: so many may be in memory as they are
_AHEAD = 4  # parts of each answer that wait for a slow reader
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy that would wait for more
]


@dataclass(frozen=True)
class Service:
    """What all requests of a server share."""

    model: Qwen2VL
    name: str  # as clients know the model
    limits: Limits
    admission: Admission
    metrics: Metrics
    pictures: PictureReader
    preparing: asyncio.Semaphore
    preparing_clips: asyncio.Semaphore

    @classmethod
    def of(cls, model: Qwen2VL, name: str, limits: Limits, pictures: PictureReader) -> Service:
        admission = Admission(limits)
        metrics = Metrics(model, admission)
        turns = asyncio.Semaphore(_PREPARING), asyncio.Semaphore(1)
        return cls(model, name, limits, admission, metrics, pictures, *turns)

    def turn_of(self, messages: Sequence[Mapping[str, Any]]) -> asyncio.Semaphore:
        """To prepare them: clips, which take long, wait for each other and keep nothing else."""
        return self.preparing_clips if has_clips(messages) else self.preparing

    @property
    def fingerprint(self) -> str:
        return f"qwen2vl-q-{_native.__version__}-{self.model.isa}"

    def require_model(self, asked: str | None) -> None:
        if asked is not None and asked != self.name:
            raise HttpError(404, f'model: "{asked}" is not served; expected "{self.name}"', "model")


class Completions:
    """POST /v1/chat/completions or /v1/completions, by the kind of body."""

    def __init__(self, service: Service, kind: type[ChatCompletion] | type[Completion]) -> None:
        self._service = service
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call(self._service, self._kind, scope["record"], send)
        work = asyncio.ensure_future(call.run(receive))
        try:
            done, _ = await asyncio.wait((work,), timeout=self._service.limits.seconds)
            if not done:
                await _stopped(work)
                limit = self._service.limits.seconds
                await call.fail(HttpError(504, f"not done after {limit:g} seconds"))
            elif (error := work.exception()) is not None:
                await call.fail(error)
                forget(error)
        finally:
            await _stopped(work)


class _Call:
    """One request."""

    def __init__(
        self,
        service: Service,
        kind: type[ChatCompletion] | type[Completion],
        record: Record,
        send: Send,
    ) -> None:
        self._service = service
        self._kind = kind
        self._record = record
        self._send = send
        self._begun = False  # an answer's status has been sent
        self._answers: list[Answer] = []
        self._start = perf_counter()
        self._queue_seconds = 0.0

    async def run(self, receive: Receive) -> None:
        """All of it, as long as the client is there."""
        with self._service.admission.memory() as memory:
            body = await read_body(receive, self._service.limits, memory)
            work = asyncio.ensure_future(self._answer(body, memory))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise HttpError(CLIENT_GONE, "the client has gone")
                work.result()
            finally:
                gone.cancel()
                await _stopped(work)

    async def fail(self, error: BaseException) -> None:
        """Tells the client, as far as that is possible."""
        told = as_http(error)
        self._record.status, self._record.error = told.status, for_log(error, told)
        if told.status == CLIENT_GONE:
            return
        with suppress(OSError):
            if self._begun:
                await self._send_part(event(body_of(told)))
                await self._send_part(b"", more=False)
            else:
                headers = {name.lower().encode(): value.encode() for name, value in told.headers.items()}
                await _send_json(self._send, told.status, body_of(told), headers)

    async def _answer(self, body: bytes, memory: Memory) -> None:
        asked = await asyncio.to_thread(parse, self._kind, body)
        asked.require_consistent()
        self._service.require_model(asked.model)
        self._require_within_limits(asked)
        async with self._service.admission.place(_answer_count(asked)):
            self._queue_seconds = perf_counter() - self._start
            try:
                reply = await self._prepare(asked)
                del body
                memory.release()
                if asked.stream:
                    await self._stream(reply, asked.include_usage)
                else:
                    await self._whole(reply)
            finally:
                for answer in self._answers:
                    answer.close()
                self._note()

    def _require_within_limits(self, asked: Asked) -> None:
        most = self._service.limits.output_tokens
        if (asked.max_answer_tokens or 0) > most:
            raise HttpError(400, f"max_tokens: expected at most {most}", "max_tokens")

    async def _prepare(self, asked: Asked) -> Reply:
        """Checks and reads what was asked, on another thread."""
        prepare: Callable[[], Reply]
        if isinstance(asked, ChatCompletion):
            chat = asked

            def prepare() -> Reply:
                messages = self._service.pictures.read(chat.messages)
                self._answers = self._service.model.chat(messages, details=True, n=chat.n, **chat.options())
                return ChatReply(*self._named(chat), bool(chat.logprobs))
        else:
            assert isinstance(asked, Completion)
            text = asked

            def prepare() -> Reply:
                model, options, prefixes = self._service.model, text.options(), []
                for prompt in text.prompts:
                    self._answers += model.complete(prompt, n=text.n, **options)
                    prefix = prompt if isinstance(prompt, str) else model.detokenize(prompt)
                    prefixes += [prefix if text.echo else ""] * text.n
                return TextReply(*self._named(text), prefixes, text.logprobs is not None)

        async with self._service.turn_of(chat.messages if isinstance(asked, ChatCompletion) else ()):
            reply = await asyncio.to_thread(prepare)
        most = self._service.limits.prompt_tokens
        if (found := max(answer.stats.prompt_tokens for answer in self._answers)) > most:
            raise HttpError(400, f"messages: expected at most {most} tokens, found {found}", "messages")
        return reply

    def _named(self, asked: Asked) -> tuple[str, str, int]:
        return self._service.name, self._service.fingerprint, asked.n

    async def _whole(self, reply: Reply) -> None:
        await _complete(self._answers, self._first_token)
        await _send_json(self._send, 200, reply.whole(self._answers, self._queue_seconds))
        self._record.status = 200

    async def _stream(self, reply: Reply, include_usage: bool) -> None:
        before = 0.0
        async for index, part in _merged(self._answers):
            now = perf_counter()
            if not self._begun:
                self._first_token()
                await self._open(reply)
            else:
                self._service.metrics.gap.observe(now - before)
            before = now
            data = (
                reply.closing(index, self._answers[index], self._queue_seconds)
                if part is None
                else reply.chunk(index, part)
            )
            await self._send_part(event(data))
        if include_usage:
            await self._send_part(event(reply.usage(self._answers)))
        await self._send_part(event("[DONE]"))
        await self._send_part(b"", more=False)

    async def _open(self, reply: Reply) -> None:
        """The status, once nothing that the client could have avoided can go wrong."""
        self._begun = True
        self._record.status = 200
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        for index in range(len(self._answers)):
            if (opening := reply.opening(index)) is not None:
                await self._send_part(event(opening))

    async def _send_part(self, body: bytes, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    def _first_token(self) -> None:
        self._service.metrics.first_token.observe(perf_counter() - self._start)

    def _note(self) -> None:
        """For the log and the metrics."""
        if not self._answers:
            return
        metrics, answers = self._service.metrics, self._answers
        metrics.count(answers, self._queue_seconds)
        metrics.duration.observe(perf_counter() - self._start)
        first = answers[0].stats
        self._record.more = {
            "prompt": first.prompt_tokens,
            "image": first.prompt_image_tokens,
            "cached": first.reused_tokens,
            "drawn": sum(answer.stats.generated_tokens for answer in answers),
            "finish": answers[0].finish_reason or "cut",
        }


def _answer_count(asked: Asked) -> int:
    return asked.n * (len(asked.prompts) if isinstance(asked, Completion) else 1)


async def _stopped(task: asyncio.Task[None]) -> None:
    """It gives back what it holds first."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))


async def _gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def _complete(answers: Sequence[Answer], first: Callable[[], None]) -> None:
    """All of them, together; calls `first` with the first part."""
    told = False
    async for _ in _merged(answers):
        if not told:
            told = True
            first()


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Part | None]]:
    """Their parts with their indices as they come; None at each one's end. What one raises ends all."""
    parts: asyncio.Queue[tuple[int, Part | BaseException | None]] = asyncio.Queue(_AHEAD * len(answers))

    async def read(index: int, answer: Answer) -> None:
        try:
            async for part in answer:
                await parts.put((index, part))
            await parts.put((index, None))
        except Exception as error:
            await parts.put((index, error))

    readers = [asyncio.ensure_future(read(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, part = await parts.get()
            if isinstance(part, BaseException):
                raise part
            left -= part is None
            yield index, part
    finally:
        for reader in readers:
            reader.cancel()
        for answer in answers:
            answer.close()
        await asyncio.wait(readers)  # their threads may still be in a step


async def _send_json(
    send: Send, status: int, body: dict[str, Any], headers: dict[bytes, bytes] | None = None
) -> None:
    content = JSONResponse(body).body
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send(
        {"type": "http.response.start", "status": status, "headers": [*fields, *(headers or {}).items()]}
    )
    await send({"type": "http.response.body", "body": bytes(content)})
