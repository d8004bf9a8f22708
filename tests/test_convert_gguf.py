"""GGUF files and pairs as the converter's source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from conversion import convert, keys_of, stored_bytes
from gguf_files import Value, f32, rewritten, text, tower_of_2024
from pictures import picture
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.convert import (
    FILE_TYPES,
    FileType,
    Recipe,
    convert_checkpoint,
    convert_gguf,
    pair_paths,
)

INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"


@pytest.mark.parametrize("type", FILE_TYPES)
def test_the_file_is_the_checkpoints(type: FileType, sources: Path, tmp_path: Path) -> None:
    """Byte for byte, whichever way the weights came."""
    convert_checkpoint(sources / "checkpoint", tmp_path / "expected.gguf", Recipe(type))
    expected = (tmp_path / "expected.gguf").read_bytes()
    language, tower = pair_paths(sources / "f32-lm")
    for model, mmproj in ((sources / "f32.gguf", None), (language, tower)):
        report = convert_gguf(model, mmproj, tmp_path / "m.gguf", Recipe(type), overwrite=True)
        assert (tmp_path / "m.gguf").read_bytes() == expected
        assert report.n_bytes == len(expected) and report.notes == []


def test_what_has_the_type_already_keeps_its_bytes(sources: Path, tmp_path: Path) -> None:
    convert(sources / "checkpoint", tmp_path / "q4.gguf", "q4_0")
    convert_gguf(tmp_path / "q4.gguf", None, tmp_path / "again.gguf", Recipe("q4_0"))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "q4.gguf").read_bytes()
    report = convert_gguf(tmp_path / "q4.gguf", None, tmp_path / "q8.gguf", Recipe("q8_0", "f16"), "New")
    before, after = stored_bytes(tmp_path / "q4.gguf"), stored_bytes(tmp_path / "q8.gguf")
    assert (
        after["blk.0.attn_q.weight"][0] == "Q8_0"
        and before["blk.0.attn_q.bias"] == after["blk.0.attn_q.bias"]
    )
    assert report.notes == [
        "1 tensors were Q6_K and are Q8_0 now: what Q6_K has lost stays lost",
        "14 tensors were Q4_0 and are Q8_0 now: what Q4_0 has lost stays lost",
        "14 tensors were Q8_0 and are F16 now: what Q8_0 has lost stays lost",
    ]
    keys = keys_of(tmp_path / "q8.gguf")
    assert (keys["general.name"], keys["general.file_type"]) == ("New", 7)
    expected = _native.GgufFile(tmp_path / "q4.gguf").read("blk.1.ffn_down.weight")
    found = _native.GgufFile(tmp_path / "q8.gguf").read("blk.1.ffn_down.weight")
    assert 0 < np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_heads_of_fine_tunes_are_kept(sources: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    heads = {
        "head.score.weight": rng.standard_normal((2, 256), np.float32),
        "head.score.bias": rng.standard_normal(2, np.float32),
    }
    rewritten(sources / "f32.gguf", tmp_path / "with.gguf", added=heads)
    report = convert_gguf(tmp_path / "with.gguf", None, tmp_path / "q4.gguf", Recipe("q4_0"))
    assert report.notes == []
    before, after = stored_bytes(tmp_path / "with.gguf"), stored_bytes(tmp_path / "q4.gguf")
    assert {name: after[name] for name in heads} == {name: before[name] for name in heads}


def test_keys_are_kept(sources: Path, tmp_path: Path) -> None:
    """Also those that nobody here reads, in their own types."""
    own: dict[str, Value] = {
        "tokenizer.chat_template": text("{{ messages[0]['content'] }}"),
        "general.author": text("Somebody"),
        "somebody.factor": f32(0.25),
        "general.sampling.temp": f32(0.5),
    }
    source = rewritten(sources / "f32.gguf", tmp_path / "m.gguf", own)
    convert_gguf(source, None, tmp_path / "q8.gguf", Recipe("q8_0"))
    before, after = _native.GgufFile(source).entries, _native.GgufFile(tmp_path / "q8.gguf").entries
    changed = {key for (key, a), (_, b) in zip(before, after, strict=True) if a != b}
    assert changed == {"general.file_type"}
    assert own.keys() < {key for key, _ in after}


def test_a_tower_of_2024_becomes_a_new_one(sources: Path, tmp_path: Path) -> None:
    language, tower = pair_paths(sources / "f32-lm")
    old = tower_of_2024(tower, tmp_path / "old.gguf")
    report = convert_gguf(language, old, tmp_path / "m.gguf", Recipe("f32"))
    assert stored_bytes(tmp_path / "m.gguf") == stored_bytes(sources / "f32.gguf")
    assert report.notes == ["1 tensors that the model does not read are left out: v.position_embd.weight"]
    assert keys_of(tmp_path / "m.gguf")["clip.vision.feed_forward_length"] == 256


@pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")
def test_llama_cpps_pair_becomes_one_file(tmp_path: Path) -> None:
    language, tower = INTEROP / "interop-f16.gguf", INTEROP / "interop-mmproj-f16.gguf"
    convert_gguf(language, tower, tmp_path / "m.gguf", Recipe("f16"))
    assert stored_bytes(tmp_path / "m.gguf") == stored_bytes(language) | stored_bytes(tower)
    whole = Qwen2VL.from_gguf(tmp_path / "m.gguf", n_threads=1)
    pair = Qwen2VL.from_gguf(language, n_threads=1, mmproj=tower)
    assert whole.tokenizer.encode("a tokenizer") == pair.tokenizer.encode("a tokenizer")
    assert whole.template.source == pair.template.source and whole.config == pair.config
    np.testing.assert_array_equal(whole.encode_image(picture(56, 84)), pair.encode_image(picture(56, 84)))


def test_what_cannot_be_converted(sources: Path, tmp_path: Path) -> None:
    language, tower = pair_paths(sources / "f32-lm")
    for model, mmproj, message in (
        (language, None, "f32-lm.gguf: it has no vision tower, and none was given"),
        (sources / "f32.gguf", tower, r"f32\.gguf: it has a vision tower of its own"),
    ):
        with pytest.raises(FormatError, match=message):
            convert_gguf(model, mmproj, tmp_path / "m.gguf", Recipe("q8_0"))
    large = tmp_path / "large"
    write_checkpoint(large, CheckpointSpec(), seed=1)
    convert(large, tmp_path / "large.gguf")
    data = bytearray((tmp_path / "large.gguf").read_bytes())
    (info,) = (
        t for t in _native.GgufFile(tmp_path / "large.gguf").tensors if t.name == "blk.1.ffn_up.weight"
    )
    for value, message in ((1e5, "F16 reaches to 65504, found 100000"), (np.nan, "not finite")):
        data[info.offset : info.offset + 4] = np.float32(value).tobytes()
        (tmp_path / "large.gguf").write_bytes(data)
        with pytest.raises(FormatError, match=rf"large\.gguf: tensor 'blk\.1\.ffn_up\.weight'.*{message}"):
            convert_gguf(tmp_path / "large.gguf", None, tmp_path / "m.gguf", Recipe("f16"))
    assert not (tmp_path / "m.gguf").exists()


def test_the_command(sources: Path, tmp_path: Path, run: Run) -> None:
    language, tower = pair_paths(sources / "f32-lm")
    out = tmp_path / "m.gguf"
    code, printed, err = run("convert", language, out, "--type", "q8_0")
    assert (code, err) == (0, f"vision tower: {tower}\n")
    assert printed.startswith(f"{out}: {out.stat().st_size:,} bytes\n")
    assert run("convert", language, out, "--type", "q8_0", "--mmproj", tower, "--force") == (0, printed, "")
    assert run("convert", out, tmp_path / "again.gguf", "--type", "q8_0")[0] == 0
    assert (tmp_path / "again.gguf").read_bytes() == out.read_bytes()
    code, _, err = run("convert", sources / "checkpoint", out, "--mmproj", tower, "--force")
    assert code == 2 and "--mmproj belongs to a GGUF file" in err
    code, _, err = run("convert", tmp_path / "none.gguf", out, "--force")
    assert code == 1 and "none.gguf: No such file" in err
