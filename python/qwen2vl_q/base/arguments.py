"""Numbers that callers and files give: their type and range, before native code meets them."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from qwen2vl_q.base.printable import printable


def integer(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. ValueError for another type (a bool, 0.5) or one out of range."""
    number = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if number is None or not least <= number <= most:
        raise ValueError(f"{name}: expected an integer of {least} to {most}, found {printable(value)}")
    return number
