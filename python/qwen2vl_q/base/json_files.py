"""JSON files from elsewhere, and their values in messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable

_MAX_TEXT_BYTES = 1 << 28  # the largest that is published, a tokenizer.json, has 11 MB
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def read_text(path: Path) -> str:
    """The file as UTF-8 text. Raises OSError, or FormatError where it is not UTF-8 or too large."""
    size = path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise FormatError(f"{path}: expected at most {_MAX_TEXT_BYTES} bytes, found {size}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: expected UTF-8 text: {error}") from error


def read_json(path: Path) -> dict[str, object]:
    """The file's JSON object. Raises OSError, or FormatError where it holds something else."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4,300 digits
        raise FormatError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_if_present(path: Path) -> dict[str, object]:
    """As read_json; an empty object where there is no such file."""
    return read_json(path) if path.exists() else {}


def quoted(value: object) -> str:
    """A JSON value in an error message: strings in quotes, so that '64' is not 64."""
    return f"'{printable(value)}'" if isinstance(value, str) else printable(value)


def as_float32(value: object) -> float | None:
    """A JSON number as float32 holds it; None for anything else, NaN and what is too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _FLOAT32_MAX:
        return None
    return float(np.float32(value))
