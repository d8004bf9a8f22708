"""Bytes on disks: in words, and room for them before it is needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from qwen2vl_q.base.printable import printable


def size_text(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def require_room(name: str, needs: Iterable[tuple[Path, int]]) -> None:
    """OSError where a disk lacks the bytes of all folders on it together."""
    totals: dict[int, tuple[Path, int]] = {}
    for folder, n_bytes in needs:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        device = place.stat().st_dev
        totals[device] = place, n_bytes + totals.get(device, (place, 0))[1]
    for place, n_bytes in totals.values():
        if n_bytes > (free := shutil.disk_usage(place).free):
            raise OSError(
                f"{name}: no space: {size_text(n_bytes)} are needed, the disk of "
                f"{printable(str(place), 300)} has {size_text(free)} left"
            )
