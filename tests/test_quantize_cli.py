"""The command quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType

from conversion import convert, keys_of, stored_bytes
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.cli.main import main
from qwen2vl_q.cli.quantize import quantize
from qwen2vl_q.convert import FileType, pair_paths
from test_imatrix import older
from test_loading import rewritten
from weight_types import with_weights

MIXES: tuple[FileType, ...] = (
    "q3_k_m",
    "iq4_xs",
    "q4_1",
    "q5_0",
    "q5_1",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(quantize, [str(a) for a in arguments])


@pytest.mark.parametrize("type", MIXES)
def test_every_source_gives_the_same_file_which_runs(type: FileType, sources: Path, tmp_path: Path) -> None:
    language, _ = pair_paths(sources / "f32-lm")
    files = []
    for i, source in enumerate((sources / "f32.gguf", language, sources / "checkpoint")):
        out = tmp_path / f"{i}.gguf"
        result = run(source, out, "--type", type, "--threads", i)
        assert result.exit_code == 0, result.output
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    tokens = [1, 2, 3, 4, 5]
    found = Qwen2VL.from_gguf(tmp_path / "0.gguf").logits(tokens)
    expected = Qwen2VL.from_gguf(sources / "f32.gguf").logits(tokens)
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.9


def test_single_tensors_and_the_vision_tower(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    options = ("--tensor", r"blk\.1\.ffn=q5_1", "--tensor", "attn_k=Q8_0", "--vision-type", "bf16")
    result = run(sources / "f32.gguf", out, "--type", "Q4_K_M", *options)
    assert result.exit_code == 0, result.output
    types = {name: type for name, (type, _) in stored_bytes(out).items()}
    assert types["blk.1.ffn_down.weight"] == types["blk.1.ffn_up.weight"] == "Q5_1"
    assert types["blk.0.attn_k.weight"] == types["blk.1.attn_k.weight"] == "Q8_0"
    assert types["v.blk.0.attn_k.weight"] == "Q8_0" and types["v.blk.0.attn_q.weight"] == "BF16"
    assert types["blk.0.attn_q.weight"] == "Q4_K" and types["token_embd.weight"] == "Q6_K"
    assert types["blk.0.attn_k.bias"] == "F32"
    assert keys_of(out)["general.file_type"] == 15


def test_weights_of_an_importance_matrix(sources: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    name = "blk.0.attn_q.weight"
    columns = rng.lognormal(0, 2, 256).astype(np.float32)
    path = tmp_path / "imatrix.dat"
    path.write_bytes(older({name: columns}, calls=1))
    errors = []
    for out, options in ((tmp_path / "a.gguf", ()), (tmp_path / "b.gguf", ("--imatrix", path))):
        result = run(sources / "f32.gguf", out, "--type", "q4_k_s", *options)
        assert result.exit_code == 0, result.output
        assert ("note: 13 matrices of layers are not in" in result.stdout) == bool(options)
        values = _native.GgufFile(sources / "f32.gguf").read(name)
        errors.append((np.square(_native.GgufFile(out).read(name) - values) * columns).sum())
    assert errors[1] < 0.8 * errors[0]
    plain, weighted = stored_bytes(tmp_path / "a.gguf"), stored_bytes(tmp_path / "b.gguf")
    assert {n for n in plain if plain[n] != weighted[n]} == {name}


def test_an_importance_matrix_of_another_model(sources: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "imatrix.dat", tmp_path / "m.gguf"
    for sums, message in (
        ({"blk.90.attn_q.weight": np.ones(256, np.float32)}, "it knows none of the model's tensors"),
        ({"blk.0.attn_q.weight": np.ones(128, np.float32)}, "expected 256 columns, found 128"),
    ):
        path.write_bytes(older(sums))
        result = run(sources / "f32.gguf", out, "--type", "q4_k_s", "--imatrix", path)
        assert isinstance(result.exception, FormatError) and message in str(result.exception)
        assert list(tmp_path.iterdir()) == [path]


def test_what_was_quantized_before_is_told_of(sources: Path, tmp_path: Path) -> None:
    convert(sources / "checkpoint", tmp_path / "q8.gguf", "q8_0")
    result = run(tmp_path / "q8.gguf", tmp_path / "m.gguf", "--type", "q4_1")
    assert "note: 14 tensors were Q8_0 and are Q4_1 now: what Q8_0 has lost stays lost" in result.stdout


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S"])
def test_types_that_only_gguf_reads(name: str, sources: Path, tmp_path: Path) -> None:
    path = with_weights(sources / "f32.gguf", tmp_path / "m.gguf", name, as_f32=False)
    with pytest.raises(UnsupportedError, match=rf"stored as {name}, .*quantize reads most others"):
        Qwen2VL.from_gguf(path)
    result = run(path, tmp_path / "f32.gguf", "--type", "f32")
    assert f"note: 14 tensors were {name} and are F32 now" in result.stdout
    expected = with_weights(sources / "f32.gguf", tmp_path / "expected.gguf", name, as_f32=True)
    assert stored_bytes(tmp_path / "f32.gguf") == stored_bytes(expected)
    assert run(path, tmp_path / "q4.gguf", "--type", "q4_k_m").exit_code == 0
    assert np.isfinite(Qwen2VL.from_gguf(tmp_path / "q4.gguf").logits([1, 2, 3])).all()


def test_types_that_nobody_reads(sources: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rewritten(sources / "f32.gguf", path, {"blk.0.attn_q.weight": GGMLQuantizationType.I8})
    result = run(path, tmp_path / "out.gguf", "--type", "q8_0")
    assert isinstance(result.exception, UnsupportedError)
    tensor = "tensor 'blk.0.attn_q.weight'"
    assert str(result.exception) == f"{path}: {tensor}: stored as I8, which cannot be read"
    assert list(tmp_path.iterdir()) == [path]


def test_usage_errors(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = sources / "f32.gguf", tmp_path / "m.gguf"
    for arguments, message in (
        ((source, out), "Missing option '--type'"),
        ((source, out, "--type", "q4_k"), "'q4_k_m'"),  # lists what there is
        ((source, out, "--type", "q4_0", "--tensor", "ffn=q9"), "expected a type of F32, F16"),
        ((source, out, "--type", "q4_0", "--tensor", "ffn(=q4_0"), "not a regular expression"),
        ((source, out, "--type", "q4_0", "--imatrix", tmp_path / "none"), "does not exist"),
        ((source, out, "--type", "q4_0", "--threads", "-1"), "--threads"),
        ((tmp_path / "no", out, "--type", "q4_0"), "is neither a folder nor a GGUF file"),
        ((source, tmp_path / "m.bin", "--type", "q4_0"), "does not end in .gguf"),
    ):
        assert main(["quantize", *map(str, arguments)]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert main(["quantize", str(source), str(out), "--type", "q4_0", "--tensor", "fnn=q8_0"]) == 1
    assert "'fnn=Q8_0': no matrix has such a name" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    out.write_bytes(b"kept")
    assert main(["quantize", str(source), str(out), "--type", "q4_0"]) == 2
    assert out.read_bytes() == b"kept"
