"""Files that models are loaded from: names, changes meanwhile, what is refused, what stays in memory."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from checkpoints import CheckpointSpec, write_checkpoint
from children import run_script
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.convert import Recipe, convert_checkpoint

posix = pytest.mark.skipif(sys.platform == "win32", reason="nobody can write to a file that is open there")


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head is read last."""
    folder = tmp_path_factory.mktemp("untied")
    spec = CheckpointSpec(tie_word_embeddings=False, vocab_size=20000)
    write_checkpoint(folder / "checkpoint", spec, seed=3)
    convert_checkpoint(folder / "checkpoint", folder / "untied.gguf", Recipe("f32"))
    return folder / "untied.gguf"


# --- files cut short while they are read ----------------------------------------------------------

CUT_DURING_LOAD = """
import os, sys
from qwen2vl_q import Qwen2VL, Qwen2VLError
def cut(stage, done, total):
    if done == total:  # the head is still to come
        os.truncate(sys.argv[1], 100_000)
try:
    Qwen2VL.from_gguf(sys.argv[1], progress=cut)
except Qwen2VLError as error:
    print(error)
"""

CUT_AFTER_OPENING = """
import os, sys
from qwen2vl_q import Qwen2VLError, _native
file = _native.GgufFile(sys.argv[1])
expected = file.metadata
os.truncate(sys.argv[1], 40_000)
assert file.metadata == expected
for read in (file.raw, file.read):
    try:
        read("output.weight")
    except Qwen2VLError as error:
        print(error)
"""


@posix
@pytest.mark.parametrize(("script", "errors"), [(CUT_DURING_LOAD, 1), (CUT_AFTER_OPENING, 2)])
def test_a_file_cut_short_is_an_error(script: str, errors: int, untied: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(untied, path)
    lines = run_script(script, path).splitlines()
    assert lines == [f"{path}: the file has been changed since it was opened"] * errors


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names are Unicode there")
def test_names_that_are_not_utf8(tiny_gguf: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff\x1b[2J.gguf"))
    shutil.copy(tiny_gguf, path)
    ids = [3, 4, 5]
    expected = Qwen2VL.from_gguf(tiny_gguf).logits(ids)
    for mmproj in (None, path):
        np.testing.assert_array_equal(Qwen2VL.from_gguf(path, mmproj=mmproj).logits(ids), expected)
    assert _native.GgufFile(os.fsencode(path)).tensors
    path.write_bytes(b"GGUF")
    for open_it in (_native.GgufFile, _native.Model, Qwen2VL.from_gguf):
        with pytest.raises(FormatError) as error:
            open_it(path)
        assert str(error.value).startswith(f"{tmp_path}/m\\xff\\x1b[2J.gguf: header: ")
    path.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        _native.GgufFile(path)
    assert missing.value.filename == str(path)


def test_a_nul_ends_no_name(tiny_gguf: Path) -> None:
    name = f"{tiny_gguf}\0.txt"
    for open_it in (
        lambda: _native.GgufFile(name),
        lambda: _native.Model(name),
        lambda: _native.Model(str(tiny_gguf), mmproj=name),
        lambda: _native.plugin_devices(name),
        lambda: _native.Model(str(tiny_gguf), device="cuda", plugin=name),
        lambda: Qwen2VL.from_gguf(name),
        lambda: Qwen2VL.from_gguf(tiny_gguf, mmproj=name),
    ):
        with pytest.raises(
            ValueError, match=r"^(path|mmproj|plugin): expected a path without NUL, found '.*\\x00"
        ):
            open_it()


# --- what is refused ------------------------------------------------------------------------------


def rewritten(
    source: Path, out: Path, retype: dict[str, GGMLQuantizationType], n_tokens: int | None = None
) -> Path:
    """A copy in which some tensors are (zeros) of other types, or the vocabulary has another length."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "qwen2vl")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == "tokenizer.ggml.tokens" and n_tokens is not None:
            value = [*value, *(f"[{i}]" for i in range(len(value), n_tokens))]
        writer.add_key_value(
            name, value, field.types[0], sub_type=field.types[-1] if len(field.types) > 1 else None
        )
    for tensor in reader.tensors:
        if (kind := retype.get(tensor.name)) is None:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        elements, size = {GGMLQuantizationType.I8: (1, 1), GGMLQuantizationType.Q8_1: (32, 40)}[kind]
        rows, columns = tensor.data.shape
        writer.add_tensor(tensor.name, np.zeros((rows, columns // elements * size), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_types_that_are_not_computed_are_named(tiny_gguf: Path, tmp_path: Path) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.ffn_up.weight", "v.blk.0.attn_out.weight")
    retype = dict.fromkeys(names, GGMLQuantizationType.I8) | {names[1]: GGMLQuantizationType.Q8_1}
    path = rewritten(tiny_gguf, tmp_path / "m.gguf", retype)
    with pytest.raises(UnsupportedError) as error:
        Qwen2VL.from_gguf(path)
    assert str(error.value) == (
        f"{path}: blk.0.attn_q.weight: stored as I8, which is not computed; "
        "computed are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, "
        "IQ4_NL, IQ4_XS (qwen2vl-q quantize reads most others)"
    )


def test_more_tokens_than_rows(tiny_gguf: Path, tmp_path: Path) -> None:
    """Fewer are ordinary: the rows are padded to a round number."""
    assert Qwen2VL.from_gguf(rewritten(tiny_gguf, tmp_path / "full.gguf", {}, 1040)).config.vocab_size == 1040
    path = rewritten(tiny_gguf, tmp_path / "over.gguf", {}, 1041)
    with pytest.raises(
        FormatError, match=r"key 'tokenizer\.ggml\.tokens': expected at most 1040 .*, found 1041"
    ):
        _native.Model(str(path))


# --- memory ---------------------------------------------------------------------------------------

RESIDENT = """
import ctypes, gc, sys
import numpy as np
from qwen2vl_q import Qwen2VL
def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
small, large = sys.argv[1:]
np.asarray(Qwen2VL.from_gguf(small).encode_image(np.zeros((56, 56, 3), np.uint8)))
before = resident()
model = Qwen2VL.from_gguf(large, n_threads=2)
print(resident() - before - model.weight_bytes)
model.encode_image(np.zeros((56, 56, 3), np.uint8))
print(resident() - before - model.weight_bytes)
print(model.weight_bytes)
del model
print(resident() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 50 MB in each half."""
    folder = tmp_path_factory.mktemp("large")
    spec = CheckpointSpec(
        hidden_size=512,
        intermediate_size=2048,
        mrope_section=(16, 24, 24),
        num_hidden_layers=3,
        embed_dim=512,
        depth=3,
        num_heads=8,
    )
    write_checkpoint(folder / "checkpoint", spec)
    convert_checkpoint(folder / "checkpoint", folder / "large.gguf", Recipe("f32"))
    return folder / "large.gguf"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and glibc")
def test_a_model_is_in_memory_once_and_gone_with_its_end(large: Path, tiny_gguf: Path) -> None:
    """Neither pages of the file nor what they were read into stay beside the packed weights."""
    text_rest, rest, weights, left = map(int, run_script(RESIDENT, tiny_gguf, large).split())
    assert weights > 60 << 20
    for extra in (text_rest, rest, left):
        assert extra < 16 << 20
