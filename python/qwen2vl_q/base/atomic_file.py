"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from qwen2vl_q.base.file_lock import try_lock
from qwen2vl_q.base.printable import printable

# Where others may write in the folder, a link would lead to a file of their choice.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def part_of(out: Path) -> Path:
    """Where `out` stands while it is written: beside it, as a rename must not cross disks."""
    return out.with_name(f"{out.name}.part")


@contextlib.contextmanager
def whole_or_not_at_all(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty file's path beside `out`; it becomes `out` at the end, or vanishes on any exception.

    The file is locked meanwhile; what a killed process has left in its place is written over. Raises
    FileExistsError where `out` exists and `overwrite` is false, BlockingIOError where it is being written.
    """

    def refuse_existing() -> None:
        if out.exists() and not overwrite:
            raise FileExistsError(f"{printable(str(out))} exists")

    refuse_existing()
    part = part_of(out)
    with _claimed(part, out) as file:
        try:
            yield part
            refuse_existing()
            if sys.platform == "win32":
                file.close()  # an open file cannot be renamed there
            part.replace(out)
        except BaseException:
            if sys.platform == "win32":
                file.close()
            part.unlink(missing_ok=True)
            raise
    _sync_folder(out.parent)


def _claimed(part: Path, out: Path) -> BinaryIO:
    """`part`, emptied and locked."""
    while True:
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666), "r+b")
        if not try_lock(file):
            file.close()
            raise BlockingIOError(f"{printable(str(out))}: another process is writing it")
        try:
            if os.path.samestat(os.fstat(file.fileno()), part.stat()):
                file.truncate(0)
                return file
        except FileNotFoundError:
            pass
        file.close()  # whoever held the lock has renamed or removed the file since it was opened


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself last through a power failure, where the system can (Windows cannot)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
