"""What went wrong, in one line on stderr."""

from __future__ import annotations

from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.cli.output import say


def complain(message: str) -> None:
    say(f"error: {' '.join(message.split())}")


def describe(error: Exception) -> str:
    """For the user; what the library did not raise on purpose is marked as internal."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, (Qwen2VLError, ValueError, OSError)):
        return str(error) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"out of memory {error}"
    return f"internal error, {type(error).__name__}: {error} (--debug shows where)"
