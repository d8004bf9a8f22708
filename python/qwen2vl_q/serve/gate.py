"""What every request passes: keys, hosts, kinds of bodies, the log, and an answer where all else fails."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2vl_q.serve.errors import CLIENT_GONE, HttpError, as_http, for_log, response_of
from qwen2vl_q.serve.log import Record

_OPEN = ("/", "/health")  # without a key, and what lies under /page/
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Gate:
    """keys: any of them opens all but the page and /health; none: everything is open. hosts: that requests
    may be addressed to, so that no page of another name that resolves to this machine speaks with it; None:
    any. write: a line of the log."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        hosts: Iterable[str] | None,
        write: Callable[[Record], None],
        ended: Callable[[Record], None],
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._hosts = None if hosts is None else _LOOPBACK | {host.lower() for host in hosts}
        self._write = write
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = scope.get("client") or ("-",)
        record = scope["record"] = Record(scope["method"], scope["path"], client[0])
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                record.status = message["status"]
            await send(message)

        start = perf_counter()
        try:
            self._require_allowed(scope)
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            record.status, record.error = record.status or CLIENT_GONE, "cancelled"
            raise
        except Exception as error:
            told = as_http(error)
            record.status, record.error = told.status, for_log(error, told)
            if not begun:
                await response_of(told)(scope, receive, send)
        finally:
            record.seconds = perf_counter() - start
            self._ended(record)
            self._write(record)

    def _require_allowed(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            raise HttpError(403, "the Host header names another machine (--allow-host)")
        if scope["method"] == "POST" and not headers.get("content-type", "").startswith("application/json"):
            raise HttpError(415, "expected Content-Type: application/json")
        path = scope["path"]
        if scope["method"] == "OPTIONS":  # a browser's question before a request; it has no key
            return
        if self._keys and path not in _OPEN and not path.startswith("/page/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(key.strip().encode(), each) for each in self._keys]
            if scheme.lower() != "bearer" or not any(known):
                raise HttpError(
                    401, "expected a key: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
                )


def _name(host: str) -> str:
    """Without the port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()
