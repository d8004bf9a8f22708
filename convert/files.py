"""A checkpoint's folder: its JSON files and its name."""

from __future__ import annotations

import re
from pathlib import Path


def model_name(folder: Path) -> str:
    """A readable name from the folder's; the hub's cache keeps it two levels above the files."""
    resolved = folder.absolute()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith("models--"):
        name = resolved.parent.parent.name.rsplit("--", 1)[-1]
    else:
        name = resolved.name
    return re.sub(r"[-_\s]+", " ", name).strip() or "Qwen2-VL"
