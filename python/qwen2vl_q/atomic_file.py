"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_or_not_at_all(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new file's path beside `out`; it becomes `out` at the end, or vanishes on any exception.

    Raises FileExistsError where `out` exists and `overwrite` is false.
    """

    def refuse_existing() -> None:
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists")

    refuse_existing()
    part = out.with_name(
        f"{out.name}.{secrets.token_hex(4)}.part"
    )  # beside it: a rename must not cross disks
    try:
        part.touch(exist_ok=False)
        yield part
        refuse_existing()
        part.replace(out)
        _sync_folder(out.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last through a power failure, where the system can (Windows cannot)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
