"""Vision towers in files of their own: llama.cpp's old ones, and those of other models, which are refused by
name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from conversion import convert
from gguf_files import Value, is_vision, rewritten, text, tower_of_2024
from pictures import picture
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.convert import FileType

INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"


@pytest.fixture(scope="module")
def language(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("language") / "text.gguf"
    return rewritten(tiny_gguf, out, keep=lambda name: not is_vision(name))


def same_embeddings(language: Path, towers: tuple[Path, Path]) -> None:
    first, second = (Qwen2VL.from_gguf(language, n_threads=1, mmproj=tower) for tower in towers)
    assert first.config == second.config
    np.testing.assert_array_equal(first.encode_image(picture(120, 90)), second.encode_image(picture(120, 90)))
    assert first.image_processor == second.image_processor


# --- 2024 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["f16", "f32"])
def test_the_first_files(type: FileType, language: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint", CheckpointSpec(), seed=21)
    convert(tmp_path / "checkpoint", tmp_path / "whole.gguf", type)
    tower = rewritten(tmp_path / "whole.gguf", tmp_path / "new.gguf", keep=is_vision, architecture="clip")
    old = tower_of_2024(tower, tmp_path / "old.gguf")
    shapes = {t.name: t.shape for t in _native.GgufFile(old).tensors}
    assert shapes["v.blk.0.ffn_up.weight"] == (64, 256) and shapes["v.blk.0.ffn_up.bias"] == (64,)
    assert _native.has_swapped_feed_forward(_native.GgufFile(old))
    same_embeddings(language, (tower, old))


def test_a_feed_forward_as_wide_as_the_tower_is_not_swapped(tmp_path: Path) -> None:
    spec = replace(CheckpointSpec(), mlp_ratio=1)
    write_checkpoint(tmp_path / "checkpoint", spec)
    convert(tmp_path / "checkpoint", tmp_path / "square.gguf")
    assert not _native.has_swapped_feed_forward(_native.GgufFile(tmp_path / "square.gguf"))


@pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")
def test_llama_cpps_own_tower_by_its_first_names(tmp_path: Path) -> None:
    tower = INTEROP / "interop-mmproj-f16.gguf"
    same_embeddings(
        INTEROP / "interop-Q8_0.gguf", (tower, tower_of_2024(tower, tmp_path / "qwen2vl-vision.gguf"))
    )


def test_a_tower_that_only_the_first_key_names(language: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    tower = rewritten(tiny_gguf, tmp_path / "new.gguf", keep=is_vision, architecture="clip")
    old = tower_of_2024(tower, tmp_path / "old.gguf")
    bare = rewritten(
        old, tmp_path / "bare.gguf", keep=lambda name: name != "clip.projector_type", architecture="clip"
    )
    same_embeddings(language, (tower, bare))


# --- what is something else -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"clip.projector_type": text("qwen2.5vl_merger")}, r"'qwen2\.5vl_merger' \(Qwen2\.5-VL\)"),
        ({"clip.projector_type": text("qwen3vl_merger")}, r"'qwen3vl_merger' \(Qwen3-VL\)"),
        ({"clip.projector_type": text("mlp")}, r"'mlp' \(LLaVA\)"),
        ({"clip.projector_type": text("cogvlm\x1b")}, r"'cogvlm\\x1b'$"),
    ],
)
def test_other_towers_are_called_by_name(
    keys: dict[str, Value], found: str, language: Path, tiny_gguf: Path, tmp_path: Path
) -> None:
    tower = rewritten(tiny_gguf, tmp_path / "mmproj.gguf", keys, is_vision, "clip")
    message = rf"mmproj\.gguf: key 'clip\.projector_type': expected 'qwen2vl_merger', found {found}"
    for load in (_native.Model, Qwen2VL.from_gguf):
        with pytest.raises(UnsupportedError, match=message):
            load(language, mmproj=tower)


def test_the_first_towers_of_qwen2_5_vl(language: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    """They have Qwen2-VL's key, and a gate."""
    path = tmp_path / "vision.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_string("clip.projector_type", "qwen2vl_merger")
    writer.add_tensor("v.blk.0.ffn_gate.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match=r"found 'qwen2\.5vl_merger' \(Qwen2\.5-VL\)"):
        Qwen2VL.from_gguf(language, mmproj=path)


def test_a_tower_of_another_width(language: Path, tmp_path: Path) -> None:
    spec = CheckpointSpec(hidden_size=96, mrope_section=(4, 4, 4))
    write_checkpoint(tmp_path / "checkpoint", spec)
    convert(tmp_path / "checkpoint", tmp_path / "wide.gguf")
    tower = rewritten(tmp_path / "wide.gguf", tmp_path / "mmproj.gguf", keep=is_vision, architecture="clip")
    with pytest.raises(
        FormatError,
        match=r"mmproj\.gguf: another model's vision tower: it projects to 96 features, .* has 64",
    ):
        Qwen2VL.from_gguf(language, mmproj=tower)


@pytest.mark.parametrize(
    ("architecture", "found"),
    [
        ("qwen2", r"'qwen2' \(Qwen2 or Qwen2\.5, without vision\)"),
        ("qwen3vl", r"'qwen3vl' \(Qwen3-VL\)"),
        ("llama", r"'llama' \(Llama, .*LLaVA"),
        ("mamba", "'mamba'$"),
    ],
)
def test_other_architectures_are_called_by_name(
    architecture: str, found: str, tiny_gguf: Path, tmp_path: Path
) -> None:
    other = rewritten(tiny_gguf, tmp_path / "m.gguf", architecture=architecture)
    for load in (_native.Model, Qwen2VL.from_gguf):
        with pytest.raises(
            UnsupportedError, match=rf"m\.gguf: expected the architecture 'qwen2vl', found {found}"
        ):
            load(other)


def test_qwen2_5_vl_has_the_same_architecture_and_other_tokens(tiny_gguf: Path, tmp_path: Path) -> None:
    tokens = gguf.GGUFReader(tiny_gguf).fields["tokenizer.ggml.tokens"].contents()
    path = rewritten(
        tiny_gguf,
        tmp_path / "m.gguf",
        {"tokenizer.ggml.tokens": (gguf.GGUFValueType.ARRAY, [*tokens[:-1], "<|fim_prefix|>"])},
    )
    with pytest.raises(UnsupportedError, match=r"m\.gguf: expected Qwen2-VL, found Qwen2\.5-VL"):
        Qwen2VL.from_gguf(path)
