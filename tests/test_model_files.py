"""What a model's file says about its sizes is checked, and the error names the file and the key or tensor."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_origin, get_type_hints

import numpy as np
import pytest

from gguf_files import Value, f32, i32, i32s, is_vision, rewritten, text, u32
from pictures import picture
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.engine.config import Qwen2VLConfig

SECTIONS = "qwen2vl.rope.dimension_sections"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("qwen2vl.embedding_length", [u32(0), i32(-64), u32(2**20 + 1)]),
        ("qwen2vl.feed_forward_length", [u32(0), u32(2**20 + 1)]),
        ("qwen2vl.block_count", [u32(0), u32(1025)]),
        ("qwen2vl.attention.head_count", [u32(0), u32(4097)]),
        ("qwen2vl.attention.head_count_kv", [u32(0), u32(4097)]),
        ("qwen2vl.attention.key_length", [u32(1), u32(4097)]),
        ("qwen2vl.context_length", [u32(0), u32(2**24 + 1)]),
        ("qwen2vl.attention.layer_norm_rms_epsilon", [f32(0), f32(1), f32(-1e-6), f32(float("nan"))]),
        ("qwen2vl.rope.freq_base", [f32(0), f32(-1), f32(float("inf")), f32(float("nan"))]),
        (SECTIONS, [i32s(4, 4), i32s(2, 3, 3, 0, 0), i32s(2, 3, 3, 1)]),
        (SECTIONS, [i32s(-2, 5, 5), i32s(17, 0, 0), i32s(17, -9, 0), i32s(2, 3, 2), i32s(2, 3, 4)]),
        ("clip.vision.embedding_length", [u32(0), u32(2**20 + 1)]),
        ("clip.vision.block_count", [u32(0), u32(1025)]),
        ("clip.vision.attention.head_count", [u32(0), u32(4097)]),
        ("clip.vision.attention.layer_norm_epsilon", [f32(0), f32(1), f32(float("nan"))]),
        ("clip.vision.spatial_merge_size", [u32(0), u32(17)]),
    ],
)
def test_sizes_out_of_range(key: str, values: list[Value], tiny_gguf: Path, tmp_path: Path) -> None:
    for value in values:
        path = rewritten(tiny_gguf, tmp_path / "m.gguf", {key: value})
        with pytest.raises(FormatError, match=rf"m\.gguf: .*{re.escape(key)}"):
            _native.Model(str(path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"qwen2vl.attention.head_count_kv": u32(3)}, "head_count 4 is not a multiple of head_count_kv 3"),
        (
            {"qwen2vl.attention.head_count": u32(3), "qwen2vl.attention.head_count_kv": u32(1)},
            "embedding_length 64 is not a multiple of head_count 3",
        ),
        ({"qwen2vl.attention.key_length": u32(15)}, "head_dim 15 is odd"),
        ({"qwen2vl.attention.key_length": u32(32)}, r"sums to 8, expected head_dim / 2 = 16"),
        ({"clip.vision.attention.head_count": u32(3)}, "64 is not a multiple of head_count 3"),
        ({"clip.vision.attention.head_count": u32(32)}, "head_dim 2 is not a multiple of 4"),
        ({"clip.vision.block_count": u32(3)}, r"v\.blk\.2\.ln1\.weight: missing"),
        ({"qwen2vl.feed_forward_length": u32(161)}, r"expected shape \[161, 64\], found \[160, 64\]"),
        ({"qwen2vl.block_count": u32(6)}, r"blk\.2\.attn_norm\.weight: missing[^$]*and 8 more"),
    ],
)
def test_sizes_that_do_not_fit(keys: dict[str, Value], message: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_gguf, tmp_path / "m.gguf", keys)
    with pytest.raises(FormatError, match=rf"m\.gguf: [^$]*{message}"):
        _native.Model(str(path))


@pytest.mark.parametrize(
    "name", ["token_embd.weight", "v.patch_embd.weight", "v.patch_embd.weight.1", "mm.2.weight", "mm.0.bias"]
)
def test_missing_tensors_are_named(name: str, tiny_gguf: Path, tmp_path: Path) -> None:
    path = rewritten(tiny_gguf, tmp_path / "m.gguf", keep=lambda found: found != name)
    with pytest.raises(FormatError, match=rf"m\.gguf: [^$]*{re.escape(name)}\W* (is )?missing"):
        _native.Model(str(path))


def test_bounds_and_defaults_are_taken(tiny: Qwen2VL, tiny_gguf: Path, tmp_path: Path) -> None:
    """The same numbers written otherwise, or left to their defaults, give the same model."""
    ids = [1, 2, 3, 4]
    expected = tiny.logits(ids)
    epsilons = ("qwen2vl.attention.layer_norm_rms_epsilon", "clip.vision.attention.layer_norm_epsilon")
    keys = {
        "qwen2vl.attention.key_length": u32(16),
        SECTIONS: i32s(2, 3, 3, 0),
        "qwen2vl.context_length": u32(2**24),
        "clip.vision.feed_forward_length": u32(7),  # wrong in files of llama.cpp: the tensors count
    }
    left_out = (*epsilons, "clip.vision.spatial_merge_size")
    path = rewritten(tiny_gguf, tmp_path / "m.gguf", keys, lambda name: name not in left_out)
    model = Qwen2VL.from_gguf(path, n_threads=1, precision="exact")
    np.testing.assert_array_equal(model.logits(ids), expected)
    np.testing.assert_array_equal(model.encode_image(picture(56, 56)), tiny.encode_image(picture(56, 56)))
    assert model.config.text_config.max_position_embeddings == 2**24
    assert model.n_ctx == 32768
    assert (
        Qwen2VL.from_gguf(
            rewritten(tiny_gguf, tmp_path / "short.gguf", {"qwen2vl.context_length": u32(1)})
        ).n_ctx
        == 1
    )
    path = rewritten(tiny_gguf, tmp_path / "theta.gguf", keep=lambda name: name != "qwen2vl.rope.freq_base")
    assert Qwen2VL.from_gguf(path).config.text_config.rope_theta == 1e6


def test_the_native_fields_are_the_typed_ones(tiny: Qwen2VL) -> None:
    """csrc/model/config.h has the one list of fields; what users see typed are the same, with these types."""
    native = tiny._native.config
    for values, config in (
        (native["text_config"], tiny.config.text_config),
        (native["vision_config"], tiny.config.vision_config),
    ):
        assert config is not None
        types = get_type_hints(type(config))
        assert list(values) == list(types)
        assert [type(values[name]) for name in types] == [get_origin(t) or t for t in types.values()]
        assert dataclasses.asdict(config) == values
    assert set(native) < set(get_type_hints(Qwen2VLConfig))


def test_files_of_other_kinds(tiny_gguf: Path, tmp_path: Path) -> None:
    other = rewritten(tiny_gguf, tmp_path / "other.gguf", architecture="llama")
    tower = rewritten(tiny_gguf, tmp_path / "tower.gguf", keep=is_vision, architecture="clip")
    language = rewritten(tiny_gguf, tmp_path / "text.gguf", keep=lambda name: not is_vision(name))
    projector = rewritten(tiny_gguf, tmp_path / "projector.gguf", {"clip.projector_type": text("mlp")})
    number = rewritten(tiny_gguf, tmp_path / "template.gguf", {"tokenizer.chat_template": u32(5)})
    for path, error, message in (
        (other, UnsupportedError, r"other\.gguf: .*expected .*'qwen2vl', found 'llama'"),
        (tower, UnsupportedError, r"tower\.gguf: .*a vision tower"),
        (projector, UnsupportedError, r"projector\.gguf: key 'clip\.projector_type': .*found 'mlp'"),
    ):
        with pytest.raises(error, match=message):
            _native.Model(str(path))
        with pytest.raises(error, match=message):
            Qwen2VL.from_gguf(path)
    with pytest.raises(FormatError, match=r"text\.gguf: expected a vision tower"):
        _native.Model(str(language), mmproj=str(language))
    with pytest.raises(FormatError, match=r"template\.gguf: tokenizer\.chat_template: expected a string"):
        Qwen2VL.from_gguf(number)
    assert Qwen2VL.from_gguf(language).config.vision_config is None


def test_a_pair_of_files_equals_the_single_one(tiny: Qwen2VL, tiny_gguf: Path, tmp_path: Path) -> None:
    language = rewritten(tiny_gguf, tmp_path / "text.gguf", keep=lambda name: not is_vision(name))
    tower = rewritten(tiny_gguf, tmp_path / "mmproj.gguf", keep=is_vision, architecture="clip")
    pair = Qwen2VL.from_gguf(language, mmproj=tower, n_threads=1, n_ctx=2048, precision="exact")
    assert pair.config == tiny.config
    assert pair.image_processor == tiny.image_processor
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(120, 90)}]}]
    ids, images = tiny.encode_chat(messages)
    np.testing.assert_array_equal(pair.encode_image(images[0]), tiny.encode_image(images[0]))
    np.testing.assert_array_equal(pair.logits(ids, images), tiny.logits(ids, images))
    answers = [m.chat(messages, stream=False, max_new_tokens=8) for m in (pair, tiny)]
    assert answers[0] == answers[1]
