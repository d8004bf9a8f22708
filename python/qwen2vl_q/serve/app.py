"""The server: its addresses, and what answers at each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve import log
from qwen2vl_q.serve.body import read_body
from qwen2vl_q.serve.completions import Completions, Service
from qwen2vl_q.serve.errors import HttpError, as_http, for_log, response_of
from qwen2vl_q.serve.gate import Gate
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.serve.memory import return_large_blocks
from qwen2vl_q.serve.metrics import CONTENT_TYPE
from qwen2vl_q.serve.pictures import PictureReader
from qwen2vl_q.serve.schema import AnyBody, ChatCompletion, Completion, Detokenize, Tokenize, parse
from qwen2vl_q.vision.fetch import Fetcher

PAGE = Path(__file__).with_name("page")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _PAGE_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_REFUSALS: tuple[Any, ...] = (HttpError, ValueError, OSError, Qwen2VLError, Exception)
_SPARE_THREADS = 16  # beside one for each answer: bodies, prompts and pictures are read there


@dataclass(frozen=True)
class Settings:
    """name: of the model, for clients. keys: none: everybody. hosts: of `Gate`. origins: of pages elsewhere
    that may speak with it. fetcher: of pictures' addresses; None: none. log_line: a record as a line, for
    `write`."""

    name: str
    limits: Limits = field(default_factory=Limits)
    keys: Sequence[str] = ()
    hosts: Sequence[str] | None = ()
    origins: Sequence[str] = ()
    fetcher: Fetcher | None = None
    log_line: Callable[[log.Record], str] = log.as_text
    write: log.Write = print


def make_app(model: Qwen2VL, settings: Settings) -> ASGIApp:
    """An ASGI application. It closes the model when it ends."""
    limits = settings.limits
    service = Service.of(model, settings.name, limits, PictureReader(model, limits, settings.fetcher))
    handlers = _Handlers(service)
    routes = [
        Route("/v1/chat/completions", Completions(service, ChatCompletion), methods=["POST"]),
        Route("/v1/completions", Completions(service, Completion), methods=["POST"]),
        Route("/v1/models", handlers.models),
        Route("/v1/models/{name:path}", handlers.model),
        Route("/tokenize", handlers.tokenize, methods=["POST"]),
        Route("/detokenize", handlers.detokenize, methods=["POST"]),
        Route("/health", handlers.health),
        Route("/metrics", handlers.metrics),
        Route("/", _page_file("index.html")),
        *(Route(f"/page/{file.name}", _page_file(file.name)) for file in sorted(PAGE.glob("*.[cj]s*"))),
    ]
    app = Starlette(
        routes=routes,
        lifespan=_lifespan(model, limits),
        exception_handlers={404: _not_found, 405: _not_found, **dict.fromkeys(_REFUSALS, _refused)},
    )

    def write(record: log.Record) -> None:
        settings.write(settings.log_line(record))

    gate = Gate(app, settings.keys, settings.hosts, write, handlers.count)
    if not settings.origins:
        return gate
    return CORSMiddleware(
        gate,
        allow_origins=list(settings.origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )


def _lifespan(model: Qwen2VL, limits: Limits) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        return_large_blocks()
        # Whoever waits for a token does so on a thread.
        executor = ThreadPoolExecutor(limits.answers + _SPARE_THREADS, thread_name_prefix="answer")
        asyncio.get_running_loop().set_default_executor(executor)
        try:
            yield
        finally:
            model.close()

    return lifespan


class _Handlers:
    """Of everything but completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time())

    def count(self, record: log.Record) -> None:
        known = record.status not in (404, 405)
        self._service.metrics.requests.labels(record.path if known else "other", record.status).inc()

    async def health(self, request: Request) -> Response:
        admission = self._service.admission
        return JSONResponse({"status": "ok", "running": admission.running, "queued": admission.queued})

    async def metrics(self, request: Request) -> Response:
        return Response(self._service.metrics.text(), media_type=CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        self._service.require_model(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        model = self._service.model
        return {
            "id": self._service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "qwen2vl-q",
            "max_model_len": model.n_ctx,
            "vision": model.config.vision_config is not None,
        }

    async def tokenize(self, request: Request) -> Response:
        asked = await self._body(request, Tokenize)
        if (asked.prompt is None) == (asked.messages is None):
            raise HttpError(400, "prompt: expected it or messages", "prompt")

        def tokens() -> list[int]:
            model = self._service.model
            if asked.messages is None:
                assert asked.prompt is not None
                model.tokenizer.require_room([asked.prompt], self._service.limits.prompt_tokens)
                return model.tokenize(asked.prompt)
            messages = self._service.pictures.read(asked.messages)
            kwargs = asked.chat_template_kwargs
            return model.encode_chat(messages, asked.add_vision_id, kwargs, asked.tools)[0]

        async with self._service.turn_of(asked.messages or ()):
            found = await asyncio.to_thread(tokens)
        return JSONResponse(
            {"tokens": found, "count": len(found), "max_model_len": self._service.model.n_ctx}
        )

    async def detokenize(self, request: Request) -> Response:
        asked = await self._body(request, Detokenize)
        most, found = self._service.limits.prompt_tokens, len(asked.tokens)
        if found > most:
            raise HttpError(400, f"tokens: expected at most {most}, found {found}", "tokens")
        text = await asyncio.to_thread(self._service.model.detokenize, asked.tokens)
        return JSONResponse({"prompt": text})

    async def _body(self, request: Request, kind: type[AnyBody]) -> AnyBody:
        with self._service.admission.memory() as memory:
            data = await read_body(request.receive, self._service.limits, memory)
            asked = await asyncio.to_thread(parse, kind, data)
        self._service.require_model(asked.model)
        return asked


def _page_file(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def page_file(request: Request) -> Response:
        return FileResponse(PAGE / name, headers=_PAGE_HEADERS)

    return page_file


async def _refused(request: Request, error: Exception) -> Response:
    told = as_http(error)
    request.scope["record"].error = for_log(error, told)
    return response_of(told)


async def _not_found(request: Request, error: Any) -> Response:
    status = error.status_code
    message = "no such address" if status == 404 else f"{request.method} is not for this address"
    return response_of(HttpError(status, message, headers=dict(error.headers or {})))
