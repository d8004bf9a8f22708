"""Which file a command's model is."""

from __future__ import annotations


def model_file(name: str) -> str:
    """The type of options and arguments that name a model: "demo" is the packaged one, all else a path."""
    from qwen2vl_q import DEMO_MODEL

    return str(DEMO_MODEL) if name == "demo" else name
