"""Values as JSON has them, from callers: checked and copied before a template or a grammar sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen2vl_q.chat.template_sandbox import MAX_DEPTH
from qwen2vl_q.text.tokenizer import require_characters


def json_value(where: str, value: Any, depth: int = 1) -> Any:
    """A copy. ValueError, beginning with `where`, for another kind of value, and for one too deep."""
    if depth > MAX_DEPTH - 2:  # what is around it counts, too
        raise ValueError(f"{where}: more than {MAX_DEPTH - 2} lists in one another")
    if isinstance(value, str):
        require_characters(value)
    elif isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where}: expected texts as an object's keys")
        return {json_value(where, key): json_value(where, item, depth + 1) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        return [json_value(where, item, depth + 1) for item in value]
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where}: expected text, numbers, lists and objects, found {type(value).__name__}")
    return value
