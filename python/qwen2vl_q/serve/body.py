"""A request's body, bounded in bytes and time."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from qwen2vl_q.serve.admission import Memory
from qwen2vl_q.serve.errors import CLIENT_GONE, HttpError
from qwen2vl_q.serve.limits import Limits

_SECONDS = 60.0  # that a body may take


async def read_body(receive: Receive, limits: Limits, memory: Memory) -> bytes:
    """HttpError 413 for one that is too large, 408 for one that does not come."""
    try:
        return await asyncio.wait_for(_read(receive, limits.body_bytes, memory), _SECONDS)
    except asyncio.TimeoutError:
        raise HttpError(408, f"the body has not come within {_SECONDS:g} seconds") from None


async def _read(receive: Receive, most: int, memory: Memory) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HttpError(CLIENT_GONE, "the client has gone")
        piece = message.get("body", b"")
        if len(body) + len(piece) > most:
            raise HttpError(413, f"expected a body of at most {most} bytes")
        memory.take(len(piece))
        body += piece
        if not message.get("more_body"):
            return bytes(body)
