"""GGUF files made to harm their reader: each kind of attack seen in the field ends in an error saying why."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from qwen2vl_q import _native
from qwen2vl_q.base.printable import printable

U8, U32, F32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9
HUGE = 2**64 - 1
PAD = bytes(4096)  # so that it is not the end of the file that saves the reader


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def header(n_tensors: int, n_kv: int, version: int = 3) -> bytes:
    return b"GGUF" + u32(version) + u64(n_tensors) + u64(n_kv)


def kv(key: bytes, kind: int, value: bytes) -> bytes:
    return u64(len(key)) + key + u32(kind) + value


def one_key(key: bytes, kind: int, value: bytes) -> bytes:
    return header(0, 1) + kv(key, kind, value)


def one_array(kind: int, length: int, data: bytes) -> bytes:
    return one_key(b"a", ARRAY, u32(kind) + u64(length) + data)


def alignment(value: int) -> bytes:
    return one_key(b"general.alignment", U32, u32(value))


def tensor(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    shape = u32(len(dims)) + b"".join(map(u64, dims))
    return u64(len(name)) + name + shape + struct.pack("<i", kind) + u64(offset)


def two_tensors(first: int, second: int) -> bytes:
    """Of 64 bytes each, at these offsets."""
    return header(2, 0) + tensor([16], 0, first, b"a") + tensor([16], 0, second, b"b\n") + PAD


def one_tensor(dims: list[int], kind: int = 0, offset: int = 0, name: bytes = b"t") -> bytes:
    return header(1, 0) + tensor(dims, kind, offset, name) + PAD


# Counts and lengths that size an allocation before anything is read (CVE-2024-21802 and its kin).
COUNTS = {
    "n_kv": (header(0, HUGE) + PAD, f"header: expected {HUGE} keys at offset 24, found only 4096 bytes"),
    "n_kv, large file": (header(0, 70_000) + bytes(13 * 70_000), "at most 65536 keys, found 70000"),
    "n_tensors": (header(2**61, 0) + PAD, f"header: expected {2**61} tensors"),
    "n_tensors, large file": (header(70_000, 0) + bytes(32 * 70_000), "at most 65536 tensors, found 70000"),
    "key": (header(0, 1) + u64(HUGE) + PAD, f"key number 0: expected {HUGE} bytes of a string"),
    "key of 2**63": (header(0, 1) + u64(2**63) + PAD, f"key number 0: expected {2**63} bytes of a string"),
    "empty key": (one_key(b"", U32, PAD), "key number 0: expected a name of 1 to 65535 bytes, found 0"),
    "long key": (one_key(b"k" * 65536, U32, PAD), "a name of 1 to 65535 bytes, found 65536"),
    "string": (one_key(b"s", STRING, u64(HUGE) + PAD), f"key 's': expected {HUGE} bytes of a string"),
    "array": (one_array(U32, HUGE, PAD), f"key 'a': expected {HUGE} array elements"),
    "array, times 4 wraps": (one_array(U32, 2**62, PAD), f"key 'a': expected {2**62} array elements"),
    "array of strings": (one_array(STRING, 2**61, PAD), f"key 'a': expected {2**61} array elements"),
    "string in array": (
        one_array(STRING, 2, u64(1) + b"x" + u64(HUGE) + PAD),
        f"key 'a': expected {HUGE} bytes",
    ),
    "nested arrays": (one_array(ARRAY, 1, (u32(ARRAY) + u64(1)) * 999), "key 'a': arrays of arrays are not"),
    "value type": (one_key(b"v", 13, PAD), "key 'v': expected a value type from 0 to 12, found 13"),
    "element type": (one_array(99, 1, PAD), "key 'a': expected a value type from 0 to 12, found 99"),
    "bool": (one_key(b"b", BOOL, b"\x02"), r"key 'b': expected a bool \(0 or 1\) at offset 37, found 2"),
    "duplicate key": (header(0, 2) + kv(b"k", F32, bytes(4)) * 2 + PAD, "key 'k': the key occurs twice"),
    "terminal escapes": (one_key(b"\x1b[2J\n\0" * 20, 13, PAD), r"key '\\x1b\[2J\\n\\x00\\x1b"),
    "version 1": (header(0, 0, 1), "header: GGUF version 1; expected 2 or 3"),
    "version 4": (header(0, 0, 4), "header: GGUF version 4; expected 2 or 3"),
}

# Sizes that overflow (CVE-2025-53630, CVE-2026-27940, CVE-2026-33298) and types that index a table.
SHAPES = {
    "product": (one_tensor([2**32, 2**32, 2, 1]), "tensor 't': the product of the dimensions overflows"),
    "product wraps to 0": (one_tensor([2**32, 2**32]), "tensor 't': the product of the dimensions overflows"),
    "bytes": (one_tensor([2**31, 2**31]), "tensor 't': its size overflows 64 bits"),
    "negative dim": (
        one_tensor([HUGE]),
        f"tensor 't': expected dimension 0 from 1 to {2**63 - 1}, found {HUGE}",
    ),
    "zero dim": (one_tensor([4, 0]), f"tensor 't': expected dimension 1 from 1 to {2**63 - 1}, found 0"),
    "no dims": (one_tensor([]), "tensor 't': expected 1 to 4 dimensions, found 0"),
    "five dims": (one_tensor([1] * 5), "tensor 't': expected 1 to 4 dimensions, found 5"),
    "n_dims": (header(1, 0) + u64(1) + b"t" + u32(2**32 - 1) + PAD, f"1 to 4 dimensions, found {2**32 - 1}"),
    "negative type": (one_tensor([32], -1), "tensor 't': expected a tensor type of GGUF, found -1"),
    "withdrawn type": (one_tensor([32], 4), "tensor 't': stored as Q4_2, which GGUF has withdrawn"),
    "blocks": (
        one_tensor([48], 2),
        "tensor 't': expected rows of a multiple of 32 values for type Q4_0, found 48",
    ),
    "unknown type": (one_tensor([32], 99), "tensor 't': expected a tensor type of GGUF, found 99"),
    "no name": (one_tensor([1], name=b""), "tensor number 0: expected a name of 1 to 65535 bytes, found 0"),
    "duplicate tensor": (header(2, 0) + tensor([1]) * 2 + PAD, "tensor 't': the tensor occurs twice"),
}

# Data outside the file (CVE-2026-7482) and alignments that lead there.
OFFSETS = {
    "past the end": (one_tensor([1], 0, 2**20), "tensor 't': expected 4 bytes at offset 1048576 of the data"),
    "wraps": (
        one_tensor([64], 0, 2**64 - 32),
        f"tensor 't': expected 256 bytes at offset {2**64 - 32} of the data",
    ),
    "too long": (one_tensor([4096]), "tensor 't': expected 16384 bytes at offset 0 of the data"),
    "no data": (
        header(1, 0) + tensor([1]),
        "of the data, which is 0 bytes long: the file is cut short or damaged",
    ),
    "not aligned": (
        one_tensor([1], 0, 4),
        "tensor 't': expected an offset that is a multiple of 32, found 4",
    ),
    "one place": (two_tensors(64, 64), r"tensor 'b\\n': .* its own, found it within that of tensor 'a'"),
    "overlap": (two_tensors(96, 64), r"tensor 'a': .* its own, found it within that of tensor 'b\\n'"),
    "alignment 0": (
        alignment(0),
        "key 'general.alignment': expected a power of two from 8 to 65536, found 0",
    ),
    "alignment 48": (alignment(48), "expected a power of two from 8 to 65536, found 48"),
    "alignment 2**31": (alignment(2**31), f"expected a power of two from 8 to 65536, found {2**31}"),
    "alignment '32'": (one_key(b"general.alignment", STRING, u64(2) + b"32"), "expected an unsigned integer"),
}

ATTACKS = COUNTS | SHAPES | OFFSETS


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, tmp_path: Path) -> None:
    content, message = ATTACKS[name]
    path = tmp_path / "attack.gguf"
    path.write_bytes(content)
    with pytest.raises((_native.FormatError, _native.UnsupportedError), match=message) as error:
        _native.GgufFile(str(path))
    found = str(error.value)
    assert found.startswith(f"{path}: ")
    assert found.isprintable()
    assert len(found) < len(str(path)) + 400


def test_array_elements_have_a_limit(tmp_path: Path) -> None:
    """One-byte integers, of which each would take eight bytes of memory; over two arrays."""
    path = tmp_path / "array.gguf"
    eight_million = kv(b"a", ARRAY, u32(U8) + u64(8 << 20) + bytes(8 << 20))
    path.write_bytes(header(0, 2) + eight_million + kv(b"b", ARRAY, u32(U8) + u64((8 << 20) + 1)))
    os.truncate(path, 32 << 20)
    with pytest.raises(_native.FormatError, match="key 'b': expected at most 16777216 array elements in all"):
        _native.GgufFile(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (one_key(b"name", STRING, u64(2) + b"\xff\xfe"), r"key 'name': expected UTF-8, found '\\xff\\xfe'"),
        (one_array(STRING, 1, u64(1) + b"\xc3"), r"key 'a': expected UTF-8, found '\\xc3'"),
        (one_key(b"\x80", U32, bytes(4)), r"key '\\x80': expected UTF-8, found '\\x80'"),
    ],
)
def test_text_that_is_not_utf8(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(content)
    file = _native.GgufFile(str(path))
    with pytest.raises(_native.FormatError, match=message):
        _ = file.metadata


def test_a_tensor_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(one_tensor([1], name=b"w\xe4"))
    file = _native.GgufFile(str(path))
    with pytest.raises(_native.FormatError, match=r"tensor 'w\\xe4': expected UTF-8"):
        _ = file.tensors


def test_long_texts_are_cut(tmp_path: Path) -> None:
    """Keys, names and values of megabytes, and the quotes of what no UTF-8 is."""
    path = tmp_path / "long.gguf"
    path.write_bytes(one_key(b"k", STRING, u64(2 << 20) + b"\xff\x1b" * (1 << 20)))
    with pytest.raises(_native.FormatError) as error:
        _ = _native.GgufFile(str(path)).metadata
    assert str(error.value).endswith(r"\xff\x1b... (2097152 in all)'") and len(str(error.value)) < 800
    path.write_bytes(header(0, 2) + kv(b"k" * 60000, BOOL, b"\1") * 2)
    with pytest.raises(
        _native.FormatError, match=r"key 'k{120}\.\.\. \(60000 in all\)': the key occurs twice"
    ):
        _native.GgufFile(str(path))


def test_texts_are_shown_as_printable_shows_them(tmp_path: Path) -> None:
    """csrc/base/printable.h and printable.py are one rule."""
    rng = np.random.default_rng(6)
    path = tmp_path / "text.gguf"
    ranges = [(0, 0xA0), (0x2000, 0x2070), (0xFEF0, 0xFF00), (0x1F600, 0x1F610), (0, 0xD800)]
    for length in [*range(1, 40), 119, 120, 121, 300]:
        text = "".join(chr(rng.integers(*ranges[rng.integers(len(ranges))])) for _ in range(length))
        path.write_bytes(one_key(text.encode(), 13, PAD))
        with pytest.raises(_native.FormatError) as error:
            _native.GgufFile(str(path))
        assert str(error.value).startswith(f"{path}: key '{printable(text)}': expected a value type")


def test_tensors_side_by_side_are_apart(tmp_path: Path) -> None:
    path = tmp_path / "apart.gguf"
    path.write_bytes(two_tensors(64, 0))
    assert [info.n_bytes for info in _native.GgufFile(str(path)).tensors] == [64, 64]


def test_a_header_has_a_limit(tmp_path: Path) -> None:
    """A string of a quarter of a gigabyte: refused before memory is taken for it."""
    path = tmp_path / "header.gguf"
    path.write_bytes(header(0, 1) + kv(b"a", STRING, u64(1 << 28)))
    os.truncate(path, 1 << 29)
    with pytest.raises(
        _native.FormatError, match="key 'a': expected all keys and tensor entries in the first"
    ):
        _native.GgufFile(str(path))
