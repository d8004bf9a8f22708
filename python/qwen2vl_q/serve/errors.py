"""Errors as the OpenAI API writes them."""

from __future__ import annotations

import re
from traceback import clear_frames
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse, Response

from qwen2vl_q.base.errors import CacheFullError, FormatError, Qwen2VLError, UnsupportedError
from qwen2vl_q.base.printable import printable

CLIENT_GONE = 499  # nginx's, for the log

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_FIELD = re.compile(r"[a-z_]+(?=[:\[])|message(?= \d)")  # at the head of a message, if it names one
_RENAMED = {"message": "messages", "max_new_tokens": "max_tokens", "token_ids": "prompt"}
_LONGEST = 1000  # characters of a message


class HttpError(Exception):
    """Ends a request with a status. param: the field that is wrong."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers or {}


def body_of(error: HttpError) -> dict[str, Any]:
    kind = _KINDS.get(error.status, "invalid_request_error")
    message = printable(str(error), _LONGEST)
    return {"error": {"message": message, "type": kind, "param": error.param, "code": None}}


def response_of(error: HttpError) -> Response:
    return JSONResponse(body_of(error), error.status, error.headers)


def as_http(error: BaseException) -> HttpError:
    """What a client is told. Messages of the library name what was wrong; of its own failures nothing is
    told but that there was one."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ValidationError):
        return _of_a_field(error)
    if isinstance(error, CacheFullError):
        return HttpError(503, f"no room in the cache: {error}", headers={"Retry-After": "1"})
    if isinstance(error, (ValueError, FormatError, UnsupportedError, OSError)):
        found = _FIELD.match(str(error))
        field = _RENAMED.get(found[0], found[0]) if found else None
        return HttpError(400, str(error), field)
    if isinstance(error, Qwen2VLError):
        return HttpError(500, str(error))
    return HttpError(500, "internal error")


def for_log(error: BaseException, told: HttpError) -> str:
    """What a client is told; of the server's own failures, which ones."""
    return f"{type(error).__name__}: {error}" if told.status == 500 else str(told)


def forget(error: BaseException | None) -> None:
    """Lets go of what its frames hold, such as a picture: tasks and their errors refer to each other, and
    Python's collector, which counts objects and not bytes, comes late."""
    while error is not None:
        if error.__traceback__ is not None:
            clear_frames(error.__traceback__)
            error.__traceback__ = None
        error = error.__context__


def _of_a_field(error: ValidationError) -> HttpError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    field = path[0] if path else None
    if first["type"] == "extra_forbidden":
        return HttpError(400, f"{printable('.'.join(path))}: unknown or unsupported", printable(path[-1]))
    return HttpError(400, f"{field}: {first['msg'][:200]}" if field else first["msg"], field)
