"""Errors that the library raises on purpose. Wrong arguments raise ValueError."""

from qwen2vl_q._native import CacheFullError, DeviceError, FormatError, UnsupportedError
from qwen2vl_q._native import Error as Qwen2VLError

__all__ = ["CacheFullError", "DeviceError", "FormatError", "Qwen2VLError", "UnsupportedError"]
