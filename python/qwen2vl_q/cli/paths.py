"""Paths as a user types them."""

from __future__ import annotations

import contextlib
from pathlib import Path


def typed_path(name: str) -> Path:
    """A leading ~ is the home folder; ~name of a user that the system does not know stays."""
    with contextlib.suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)
