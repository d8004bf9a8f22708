"""Files that appear whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from qwen2vl_q.base import atomic_file, file_lock
from qwen2vl_q.base.atomic_file import part_of, whole_or_not_at_all


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_leftover_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    part_of(out).write_text("of a run that was killed")
    with whole_or_not_at_all(out, overwrite=False) as part:
        assert part == part_of(out)
        assert part.stat().st_size == 0
        part.write_text("whole")
    assert out.read_text() == "whole"
    assert names(tmp_path) == ["m.gguf"]


def test_an_exception_leaves_the_file_before(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("before")
    with pytest.raises(KeyboardInterrupt), whole_or_not_at_all(out, overwrite=True) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert out.read_text() == "before"
    assert names(tmp_path) == ["m.gguf"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with pytest.raises(FileExistsError), whole_or_not_at_all(out, overwrite=False) as part:
        part.write_text("ours")
        out.write_text("theirs")
    assert out.read_text() == "theirs"
    assert names(tmp_path) == ["m.gguf"]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with whole_or_not_at_all(out, overwrite=True) as part:
        part.write_text("first")
        with (
            pytest.raises(BlockingIOError, match=r"m\.gguf: another process is writing it"),
            whole_or_not_at_all(out, overwrite=True),
        ):
            pass
        assert part.read_text() == "first"
    assert out.read_text() == "first"


@pytest.mark.skipif(os.name != "posix", reason="an open file can be renamed")
def test_a_part_that_is_renamed_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other writer is done between our opening and our locking: what we hold is its whole file."""
    out = tmp_path / "m.gguf"
    part_of(out).write_text("theirs, whole")
    lock = file_lock.try_lock

    def late(file: BinaryIO) -> bool:
        if not out.exists():
            part_of(out).replace(out)
        return lock(file)

    monkeypatch.setattr(atomic_file, "try_lock", late)
    with whole_or_not_at_all(out, overwrite=True) as part:
        assert out.read_text() == "theirs, whole"
        part.write_text("ours")
    assert out.read_text() == "ours"


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links of POSIX")
def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    part_of(tmp_path / "m.gguf").symlink_to(precious)
    with pytest.raises(OSError, match=r"m\.gguf\.part"), whole_or_not_at_all(tmp_path / "m.gguf", True):
        pass
    assert precious.read_text() == "kept"
