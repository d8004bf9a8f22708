"""llama.cpp's importance matrices, in both forms, whole and damaged."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from gguf_mutations import mutated, places
from qwen2vl_q.base.errors import FormatError, Qwen2VLError
from qwen2vl_q.checkpoint.tensor_map import Role
from qwen2vl_q.convert import Imatrix, Recipe, read_imatrix
from qwen2vl_q.convert.recipe import TextShape

Floats = NDArray[np.float32]
DATA = Path(__file__).parent / "data" / "imatrix"
SUMS: dict[str, Floats] = {
    "blk.0.attn_q.weight": np.arange(64, dtype=np.float32),
    "blk.0.ffn_down.weight": np.linspace(1, 9, 96, dtype=np.float32),
}
CALLS = 4


def older(sums: Mapping[str, Floats] = SUMS, calls: int = CALLS) -> bytes:
    data = struct.pack("<i", len(sums))
    for name, values in sums.items():
        data += struct.pack("<i", len(name)) + name.encode()
        data += struct.pack("<ii", calls, values.size) + values.astype("<f4").tobytes()
    return data + struct.pack("<ii", 7, 4) + b"data"


def write_gguf(path: Path, sums: Mapping[str, Floats] = SUMS, counts: float = CALLS) -> Path:
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["data"])
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_both_forms_hold_means(tmp_path: Path) -> None:
    for path in (written(tmp_path / "i.dat", older()), write_gguf(tmp_path / "i.gguf")):
        found = read_imatrix(path)
        assert found.columns.keys() == SUMS.keys()
        for name, sums in SUMS.items():
            np.testing.assert_array_equal(found.columns[name], sums / CALLS)
        weights = found.weights("blk.0.attn_q.weight", 64)
        assert weights is not None and weights.dtype == np.float32
        assert found.weights("blk.1.attn_q.weight", 64) is None
        with pytest.raises(FormatError, match=r"attn_q\.weight': expected 32 columns, found 64"):
            found.weights("blk.0.attn_q.weight", 32)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_llama_cpps_own(form: str) -> None:
    """data/imatrix: by llama.cpp's collector and writers, see its README."""
    found = read_imatrix(DATA / f"llama.{form}")
    stored = {tensor.name: tensor.data for tensor in GGUFReader(DATA / "llama.gguf").tensors}
    assert len(found.columns) == 14
    for name, columns in found.columns.items():
        np.testing.assert_array_equal(stored[f"{name}.counts"], [11 * 32])
        np.testing.assert_allclose(columns, stored[f"{name}.in_sum2"] / (11 * 32), rtol=3e-7)
    for name in ("attn_k", "attn_v"):  # they read what attn_q reads
        np.testing.assert_array_equal(
            found.columns[f"blk.1.{name}.weight"], found.columns["blk.1.attn_q.weight"]
        )


def test_what_was_never_called_keeps_its_sums(tmp_path: Path) -> None:
    found = read_imatrix(written(tmp_path / "i.dat", older(calls=0)))
    np.testing.assert_array_equal(found.columns["blk.0.attn_q.weight"], SUMS["blk.0.attn_q.weight"])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_values_are_finite_and_not_negative(tmp_path: Path, bad: float) -> None:
    sums = {"blk.0.attn_q.weight": np.array([1, bad, 1], np.float32)}
    for path in (written(tmp_path / "i.dat", older(sums)), write_gguf(tmp_path / "i.gguf", sums)):
        with pytest.raises(FormatError, match=r"attn_q.weight': expected finite numbers of 0 or more"):
            read_imatrix(path)


def test_every_way_to_cut_the_older_form(tmp_path: Path) -> None:
    whole, path = older(), tmp_path / "i.dat"
    end = len(whole) - 12  # what follows the entries is not read
    for size in range(end):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="not an importance matrix: "):
            read_imatrix(path)
    read_imatrix(written(path, whole[:end]))


@pytest.mark.parametrize("value", [-1, 1 << 20, (1 << 31) - 1, -(1 << 31)])
@pytest.mark.parametrize("at", [0, 4, 8 + 19, 8 + 19 + 4])
def test_numbers_of_the_older_form_out_of_range(tmp_path: Path, at: int, value: int) -> None:
    data = bytearray(older())
    data[at : at + 4] = struct.pack("<i", value)
    if at == 8 + 19 and value > 0:
        read_imatrix(written(tmp_path / "i.dat", bytes(data)))  # so many calls may have been
        return
    with pytest.raises(FormatError, match="not an importance matrix: "):
        read_imatrix(written(tmp_path / "i.dat", bytes(data)))


def test_noise_and_other_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for size in (0, 1, 3, 4, 100, 5000):
        with pytest.raises(FormatError):
            read_imatrix(written(tmp_path / "i.dat", rng.integers(0, 256, size, np.uint8).tobytes()))
    with pytest.raises(FormatError, match="it has no tensor's importance"):
        read_imatrix(written(tmp_path / "i.dat", struct.pack("<i", 0)))
    with pytest.raises(FormatError, match="it has no tensor's importance"):
        read_imatrix(write_gguf(tmp_path / "i.gguf", {}))
    with pytest.raises(FileNotFoundError):
        read_imatrix(tmp_path / "nothing")


def test_gguf_of_another_build(tmp_path: Path) -> None:
    def write(tensors: Mapping[str, NDArray[Any]]) -> Path:
        writer = GGUFWriter(tmp_path / "i.gguf", "")
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "i.gguf"

    sums, one = np.ones((1, 64), np.float32), np.ones((1, 1), np.float32)
    two = np.ones((2, 64), np.float32)
    cases: tuple[tuple[dict[str, NDArray[Any]], str], ...] = (
        ({"a.in_sum2": sums}, "'a.counts' is missing"),
        ({"a.in_sum2": sums.astype(np.float16), "a.counts": one}, "expected F32, found F16 and F32"),
        (
            {"a.in_sum2": two, "a.counts": one},
            r"expected one matrix, found \(2, 64\)",
        ),
        ({"a.in_sum2": sums, "a.counts": np.ones((2, 1), np.float32)}, "expected one matrix"),
    )
    for tensors, message in cases:
        with pytest.raises(FormatError, match=message):
            read_imatrix(write(tensors))


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    refused = 0
    for seed in range(150):
        try:
            damaged = mutated(whole, places(whole), np.random.default_rng(seed))
            read_imatrix(written(tmp_path / "i.gguf", damaged))
        except Qwen2VLError:
            refused += 1
    assert refused > 50


def test_types_that_suffer_in_early_layers_give_way(tmp_path: Path) -> None:
    """As in llama-quantize: with weights Q4_0 and Q5_0 of the first ffn_down may be far off."""
    shape = TextShape(28, 6, True)
    for type, early in (("q4_0", "Q4_1"), ("q5_0", "Q5_1")):
        recipe = Recipe(type, imatrix=Imatrix(tmp_path, SUMS))  # type: ignore[arg-type]
        found = [recipe.wanted(Role.LANGUAGE, f"blk.{i}.ffn_down.weight", shape) for i in range(28)]
        assert found == [early] * 3 + [type.upper()] * 25
