"""Errors that the library raises on purpose. Wrong arguments raise ValueError."""

from qwen2vl_q._native import Error as Qwen2VLError
from qwen2vl_q._native import FormatError, UnsupportedError

__all__ = ["FormatError", "Qwen2VLError", "UnsupportedError"]
