"""Paths as a user types them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def typed_path(name: str) -> Path:
    """A leading ~ is the home folder; ~ and an unknown name stay. ValueError for ""."""
    if not name:
        raise ValueError("expected a file's name, found ''")
    with contextlib.suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)
