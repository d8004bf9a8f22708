"""Models split in several files: any part stands for the whole, and what is no part of it is refused."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_files import i32, rewritten, split_file, u16
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError

N_PARTS = 4


@pytest.fixture
def parts(tiny_gguf: Path, tmp_path: Path) -> list[Path]:
    """m-00001-of-00004.gguf and so on."""
    n_tensors = len(_native.GgufFile(tiny_gguf).tensors)
    found = split_file(tiny_gguf, tmp_path / "parts", -(-n_tensors // N_PARTS))
    assert [part.name for part in found] == [f"m-{i + 1:05}-of-{N_PARTS:05}.gguf" for i in range(N_PARTS)]
    return found


def rewrite(part: Path, **keys: int) -> None:
    """Other numbers in its keys split.*; -1 takes one away."""
    names = {f"split.{name.replace('_', '.')}": value for name, value in keys.items()}
    changed = {
        name: (i32 if "tensors" in name else u16)(value) for name, value in names.items() if value >= 0
    }
    gone = {name for name, value in names.items() if value < 0}
    shutil.move(rewritten(part, part.with_suffix(".new"), changed, lambda name: name not in gone), part)


def rewrite_all(parts: list[Path], **keys: int) -> None:
    for part in parts:
        rewrite(part, **keys)


def test_any_part_stands_for_the_whole(tiny: Qwen2VL, tiny_gguf: Path, parts: list[Path]) -> None:
    whole = _native.GgufFile(tiny_gguf)
    picture = np.full((56, 56, 3), 77, np.uint8)
    expected = tiny.logits([1, 2, 3])
    for part in parts:
        file = _native.GgufFile(part)
        assert file.n_bytes == sum(other.stat().st_size for other in parts)
        assert [(t.name, t.shape) for t in file.tensors] == [(t.name, t.shape) for t in whole.tensors]
        for tensor in whole.tensors:
            np.testing.assert_array_equal(file.raw(tensor.name), whole.raw(tensor.name))
    for part in (parts[0], parts[-1]):
        model = Qwen2VL.from_gguf(part, n_threads=1, precision="exact")
        np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)
        np.testing.assert_array_equal(model.encode_image(picture), tiny.encode_image(picture))


def test_one_part_of_one(tiny_gguf: Path, tmp_path: Path) -> None:
    """As llama.cpp marks what it has merged again: under any name."""
    for count in (0, 1):
        path = rewritten(tiny_gguf, tmp_path / f"{count}.gguf", {"split.count": u16(count)})
        assert Qwen2VL.from_gguf(path).config.vision_config is not None


DAMAGE: dict[str, tuple[Callable[[list[Path]], Any], str]] = {
    "missing": (
        lambda parts: parts[2].unlink(),
        r"m-00001-of-00004\.gguf: one of 4 parts, of which m-00003-of-00004\.gguf is missing",
    ),
    "another's place": (
        lambda parts: shutil.copy(parts[1], parts[2]),
        r"m-00003-of-00004\.gguf: key 'split\.no': expected 2 in a part of \S*, found 1",
    ),
    "of another number": (
        lambda parts: rewrite(parts[3], count=5),
        r"m-00004-of-00004\.gguf: key 'split\.count': expected 4 in a part of \S*, found 5",
    ),
    "of another model": (
        lambda parts: rewrite(parts[1], tensors_count=7),
        r"m-00002-of-00004\.gguf: key 'split\.tensors\.count': expected \d+ in a part of \S*, found 7",
    ),
    "tensors twice": (
        lambda parts: rewrite(Path(shutil.copy(parts[1], parts[2])), no=2),
        r"m-00003-of-00004\.gguf: tensor '\S+': is also in \S*m-00002-of-00004\.gguf",
    ),
    "too few tensors": (
        lambda parts: rewrite_all(parts, tensors_count=99),
        r"m-00001-of-00004\.gguf: key 'split\.tensors\.count': expected \d+, the tensors .*, found 99",
    ),
    "no number": (
        lambda parts: rewrite(parts[0], no=-1),
        r"m-00001-of-00004\.gguf: key 'split\.no': expected 0\.\.3, found no such key",
    ),
    "number too large": (
        lambda parts: rewrite(parts[0], no=4),
        r"m-00001-of-00004\.gguf: key 'split\.no': expected 0\.\.3, found 4",
    ),
    "too many": (
        lambda parts: rewrite(parts[0], count=1025),
        r"m-00001-of-00004\.gguf: key 'split\.count': expected 0\.\.1024, found 1025",
    ),
    "no file of GGUF": (
        lambda parts: parts[1].write_bytes(b"GGML"),
        r"m-00002-of-00004\.gguf: header: not a GGUF file",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_part(name: str, parts: list[Path]) -> None:
    damage, message = DAMAGE[name]
    damage(parts)
    with pytest.raises(FormatError, match=message) as error:
        _native.GgufFile(parts[0])
    assert "\n" not in str(error.value)
    with pytest.raises(FormatError):
        Qwen2VL.from_gguf(parts[0])


def test_a_part_under_another_name(parts: list[Path]) -> None:
    for name in ("renamed.gguf", "m-00003-of-00004.gguf", "m-00002-of-00005.gguf"):
        path = parts[1].rename(parts[1].with_name(name))
        with pytest.raises(
            FormatError,
            match=r"part 2 of 4 by its keys: expected a name that ends in '-00002-of-00004\.gguf'",
        ):
            _native.GgufFile(path)
        path.rename(parts[1])


@pytest.mark.skipif(sys.platform == "win32", reason="nobody can write to a file that is open there")
def test_a_part_cut_short_after_it_was_opened(parts: list[Path]) -> None:
    file = _native.GgufFile(parts[0])
    last = file.tensors[-1].name
    with parts[-1].open("r+b") as part:
        part.truncate(100)
    with pytest.raises(_native.Error, match=r"m-00004-of-00004\.gguf: the file has been changed"):
        file.raw(last)
