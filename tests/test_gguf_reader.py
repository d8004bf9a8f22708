"""The native GGUF reader: files that the gguf package writes, and files that somebody damaged on purpose."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFValueType, GGUFWriter, quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as T

from qwen2vl_q import _native

SCALARS: dict[str, tuple[GGUFValueType, Any]] = {
    "u8": (GGUFValueType.UINT8, 255),
    "i8": (GGUFValueType.INT8, -128),
    "u16": (GGUFValueType.UINT16, 65535),
    "i16": (GGUFValueType.INT16, -32768),
    "u32": (GGUFValueType.UINT32, 2**32 - 1),
    "i32": (GGUFValueType.INT32, -(2**31)),
    "u64": (GGUFValueType.UINT64, 2**64 - 1),
    "i64": (GGUFValueType.INT64, -(2**63)),
    "f32": (GGUFValueType.FLOAT32, 0.15625),
    "f64": (GGUFValueType.FLOAT64, 1e-300),
    "bool": (GGUFValueType.BOOL, True),
    "string": (GGUFValueType.STRING, "ein Glück, 好 🙂"),
}
ARRAYS: dict[str, list[Any]] = {
    "ints": [-1, 0, 2**31 - 1],
    "floats": [0.5, -0.25],
    "bools": [True, False, True],
    "strings": ["", "a", "ü" * 300],
    "large": [-(2**62), 2**62],
}


def write(path: Path, add: Callable[[GGUFWriter], None], endianess: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    """A GGUF file with what `add(writer)` puts into it."""
    writer = GGUFWriter(path, "qwen2vl", endianess=endianess)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_everything(writer: GGUFWriter) -> None:
    for key, (value_type, value) in SCALARS.items():
        writer.add_key_value(key, value, value_type)
    for key, items in ARRAYS.items():
        sub_type = GGUFValueType.INT64 if key == "large" else None
        writer.add_key_value(key, items, GGUFValueType.ARRAY, sub_type=sub_type)
    rng = np.random.default_rng(0)
    for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0):
        values = rng.standard_normal((2, 3, 64)).astype(np.float32)
        writer.add_tensor(f"t.{kind.name}", quants.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor("t.Q6_K", _native.quantize(np.ones((3, 256), np.float32), "Q6_K"), raw_dtype=T.Q6_K)
    writer.add_tensor("t.four", np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "everything.gguf", add_everything)


def test_reads_every_kind_of_value(everything: Path) -> None:
    file = _native.GgufFile(str(everything))
    assert (file.version, file.alignment) == (3, 32)
    expected = (
        {"general.architecture": "qwen2vl"} | {key: value for key, (_, value) in SCALARS.items()} | ARRAYS
    )
    assert file.metadata == expected
    for key, value in expected.items():
        assert type(file.metadata[key]) is type(value), key


def test_reads_tensors(everything: Path) -> None:
    file = _native.GgufFile(str(everything))
    content = everything.read_bytes()
    infos = {info.name: info for info in file.tensors}
    assert [*infos] == ["t.F32", "t.F16", "t.BF16", "t.Q8_0", "t.Q4_0", "t.Q6_K", "t.four"]
    for info in infos.values():
        raw = file.raw(info.name)
        assert raw.tobytes() == content[info.offset : info.offset + info.n_bytes]
        kind = T[info.type]
        values = file.read(info.name)
        assert values.shape == info.shape
        np.testing.assert_array_equal(values.ravel(), quants.dequantize(raw.reshape(1, -1), kind).ravel())
    assert infos["t.F32"].shape == (2, 3, 64)
    assert infos["t.Q6_K"].n_bytes == 3 * 210
    np.testing.assert_array_equal(file.read("t.four"), np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))


def test_arrays_outlive_the_file(everything: Path) -> None:
    file = _native.GgufFile(str(everything))
    values, raw, infos, metadata = file.read("t.four"), file.raw("t.four"), file.tensors, file.metadata
    del file
    assert values.sum() == raw.view(np.float32).sum() == 276
    assert infos[-1].name == "t.four"
    assert metadata["string"] == SCALARS["string"][1]


def test_every_storage_type_has_gguf_s_size(tmp_path: Path) -> None:
    """Types that nothing here computes with are still listed, with the right size."""

    def add(writer: GGUFWriter) -> None:
        for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
            elements = np.zeros((2, 512 // GGML_QUANT_SIZES[kind][0] * block_bytes), np.uint8)
            writer.add_tensor(kind.name, elements, raw_dtype=kind)

    file = _native.GgufFile(str(write(tmp_path / "types.gguf", add)))
    assert [(info.type, info.shape) for info in file.tensors] == [
        (k.name, (2, 512)) for k in GGML_QUANT_SIZES
    ]
    for info, (block_elements, block_bytes) in zip(file.tensors, GGML_QUANT_SIZES.values(), strict=True):
        assert info.n_bytes == 1024 // block_elements * block_bytes == len(file.raw(info.name))
    with pytest.raises(
        _native.UnsupportedError, match=r"types\.gguf: tensor 'IQ3_S': stored as IQ3_S, which is not computed"
    ):
        file.read("IQ3_S")
    with pytest.raises(KeyError, match="no tensor 'IQ3_s'"):
        file.read("IQ3_s")


def test_alignment_and_an_empty_file(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(128)
        writer.add_tensor("a", np.ones(3, np.float32))
        writer.add_tensor("b", np.ones(5, np.float32))

    file = _native.GgufFile(str(write(tmp_path / "aligned.gguf", add)))
    assert file.alignment == 128
    assert [info.offset % 128 for info in file.tensors] == [0, 0]
    assert _native.GgufFile(str(write(tmp_path / "none.gguf", lambda writer: None))).tensors == []


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    big = write(tmp_path / "big.gguf", lambda writer: None, endianess=GGUFEndian.BIG)
    with pytest.raises(_native.UnsupportedError, match=r"big\.gguf: header: a big-endian GGUF file"):
        _native.GgufFile(str(big))
    for content, message in [
        (b"", "expected 4 bytes of magic at offset 0, found only 0"),
        (b"GG", "expected 4 bytes of magic at offset 0, found only 2"),
        (b"\x7fELF" + bytes(99), r"expected it to start with 'GGUF', found '\\x7fELF'"),
        (b"GGUF", "expected 1 number at offset 4, found only 0 bytes"),
    ]:
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(_native.FormatError, match=message):
            _native.GgufFile(str(tmp_path / "x.gguf"))


def test_files_that_the_system_refuses(tmp_path: Path) -> None:
    """As open() does."""
    missing = tmp_path / "missing.gguf"
    with pytest.raises(FileNotFoundError) as error:
        _native.GgufFile(str(missing))
    assert error.value.filename == str(missing) and "No such file" in str(error.value)
    with pytest.raises(IsADirectoryError if os.name == "posix" else PermissionError):
        _native.GgufFile(str(tmp_path))
    (tmp_path / "closed.gguf").touch(mode=0)
    if not os.access(tmp_path / "closed.gguf", os.R_OK):  # root may read everything
        with pytest.raises(PermissionError):
            _native.GgufFile(str(tmp_path / "closed.gguf"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(_native.Error, match=r"pipe\.gguf: not a regular file"):
        _native.GgufFile(str(tmp_path / "pipe.gguf"))


# --- random damage --------------------------------------------------------------------------------

# Reads every file named on standard input in one process that may take little more memory than it has at the
# start: what allocates by a number in the file ends in a MemoryError, which is not among the errors allowed.
READ_THEM_ALL = """
import sys
import numpy  # before the limit is set, as its BLAS reserves memory
from qwen2vl_q import _native
def allowed_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096 + (64 << 20)
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (allowed_bytes(), allowed_bytes()))
counts = {"read": 0, "refused": 0}
for path in sys.stdin.read().split():
    try:
        file = _native.GgufFile(path)
        file.metadata
        for info in file.tensors:
            file.raw(info.name)
            try:
                file.read(info.name)
            except _native.UnsupportedError:
                pass
        counts["read"] += 1
    except (_native.FormatError, _native.UnsupportedError) as error:
        assert str(error).startswith(path + ": "), error
        counts["refused"] += 1
print(counts["read"], counts["refused"])
"""


def read_in_a_child(paths: list[Path]) -> tuple[int, int]:
    """(files read, files refused); anything else that happens to the child fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", READ_THEM_ALL],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-2000:]}"
    read, refused = map(int, done.stdout.split())
    assert read + refused == len(paths)
    return read, refused


def mutate(content: bytes, header_bytes: int, rng: np.random.Generator) -> bytes:
    """One to four changes to the header, the keys and the tensor entries; now and then anywhere."""
    data = bytearray(content)
    extremes = [0, 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]
    for _ in range(rng.integers(1, 5)):
        end = header_bytes if rng.random() < 0.9 else len(data) - 8
        at = int(rng.integers(4, end))
        match int(rng.integers(0, 4)):
            case 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                data[at] = int(rng.integers(0, 256))
            case 2:
                data[at : at + 8] = struct.pack("<Q", extremes[int(rng.integers(0, len(extremes)))])
            case _:
                data[at : at + 4] = struct.pack("<I", int(rng.integers(0, 64)))
    return bytes(data)


def test_mutated_and_truncated_files(everything: Path, tmp_path: Path) -> None:
    content = everything.read_bytes()
    header_bytes = min(info.offset for info in _native.GgufFile(str(everything)).tensors)
    rng = np.random.default_rng(2024)
    files = [mutate(content, header_bytes, rng) for _ in range(200)]
    lengths = [
        *range(0, 25),
        *rng.integers(25, header_bytes, 20),
        *rng.integers(header_bytes, len(content) - 32, 5),
    ]
    files += [content[: int(length)] for length in lengths]
    paths = [tmp_path / f"{i}.gguf" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    assert read_in_a_child([everything, everything]) == (2, 0)
    _, refused = read_in_a_child(paths[:200])
    assert refused > 100  # the changes do hit
    assert read_in_a_child(paths[200:]) == (0, 50)
