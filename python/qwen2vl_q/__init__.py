"""Qwen2-VL on ordinary hardware: one quantized GGUF file, a native CPU core, pictures in, answers out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen2vl_q.base.errors import CacheFullError as CacheFullError
    from qwen2vl_q.base.errors import DeviceError as DeviceError
    from qwen2vl_q.base.errors import FormatError as FormatError
    from qwen2vl_q.base.errors import Qwen2VLError as Qwen2VLError
    from qwen2vl_q.base.errors import UnsupportedError as UnsupportedError
    from qwen2vl_q.chat.grounding import Region as Region
    from qwen2vl_q.chat.grounding import parse_grounding as parse_grounding
    from qwen2vl_q.engine.config import Qwen2VLConfig as Qwen2VLConfig
    from qwen2vl_q.model import Qwen2VL as Qwen2VL
    from qwen2vl_q.vision.video import VideoOptions as VideoOptions

DEMO_MODEL: Path = Path(__file__).with_name("data") / "demo.gguf"
"""A small model that comes with the package (9 MB, Q8_0). It knows nothing but cards as `qwen2vl-q demo`
draws them, short texts and forms on such cards, and clips of their shapes."""

# Resolved on first use: the command line's --help and the converter need neither the tokenizer nor Pillow.
_HOME = {
    "CacheFullError": "base.errors",
    "DeviceError": "base.errors",
    "FormatError": "base.errors",
    "Qwen2VL": "model",
    "Qwen2VLConfig": "engine.config",
    "Qwen2VLError": "base.errors",
    "Region": "chat.grounding",
    "UnsupportedError": "base.errors",
    "VideoOptions": "vision.video",
    "parse_grounding": "chat.grounding",
}
__all__ = [
    "DEMO_MODEL",
    "CacheFullError",
    "DeviceError",
    "FormatError",
    "Qwen2VL",
    "Qwen2VLConfig",
    "Qwen2VLError",
    "Region",
    "UnsupportedError",
    "VideoOptions",
    "__version__",
    "parse_grounding",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        return import_module("qwen2vl_q._native").__version__
    if name in _HOME:
        return getattr(import_module(f"qwen2vl_q.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
