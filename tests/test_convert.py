"""What the converter writes: tensors, types, keys, tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize as gguf_quantize
from numpy.typing import NDArray

from checkpoints import TOKENIZER, CheckpointSpec, random_tensors, write_checkpoint
from conversion import convert, edit_json, keys_of, stored_bytes
from qwen2vl_q._native import quantize
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint
from qwen2vl_q.convert.files import model_name

SPEC = CheckpointSpec()
ODD = CheckpointSpec(  # no block divides 72, 100, 36 or 108
    hidden_size=72,
    intermediate_size=100,
    num_attention_heads=6,
    num_key_value_heads=3,
    mrope_section=(2, 2, 2),
    embed_dim=36,
    num_heads=3,
    mlp_ratio=3,
    tie_word_embeddings=False,
)
LLAMA_CPP_SPEC = CheckpointSpec(  # the sizes of the files behind data/llama_cpp_names.json
    hidden_size=256,
    intermediate_size=512,
    mrope_section=(8, 12, 12),
    rope_theta=1e6,
    vocab_size=1280,
    embed_dim=128,
    depth=3,
    dtype="BF16",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SPEC)


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return write_checkpoint(tmp_path / "checkpoint", SPEC)


def expected_tensors(spec: CheckpointSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """What the file must hold, by a renaming of its own (not the converter's table)."""
    expected = {}
    for name, values in random_tensors(spec, seed).items():
        for old, new in (
            ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
            ("model.layers.", "blk."), ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"),
            ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.fc1", "ffn_up"),
            ("mlp.fc2", "ffn_down"), ("visual.merger.mlp.", "mm."), ("visual.merger.ln_q", "v.post_ln"),
            ("mlp.", "ffn_"), ("_proj", ""), ("visual.blocks.", "v.blk."), ("attn.proj", "attn_out"),
            (".norm1", ".ln1"), (".norm2", ".ln2"), ("visual.patch_embed.proj", "v.patch_embd"),
        ):  # fmt: skip
            name = name.replace(old, new)
        if ".attn.qkv" in name:
            for letter, part in zip("qkv", np.split(values, 3), strict=True):
                expected[name.replace(".attn.qkv", f".attn_{letter}")] = part
        elif name == "v.patch_embd.weight":
            expected[name], expected[name + ".1"] = values[:, :, 0], values[:, :, 1]
        else:
            expected[name] = values
    return expected


# --- tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        ODD,
        dataclasses.replace(SPEC, layout="nested", naming="nested", n_shards=3),
        dataclasses.replace(SPEC, dtype="F16", n_shards=2, naming="nested"),
        dataclasses.replace(SPEC, dtype="BF16", tie_word_embeddings=False, tokenizer="vocab"),
        dataclasses.replace(SPEC, outlier_channels=3),
    ],
    ids=["plain", "odd", "nested", "f16", "bf16", "outliers"],
)
def test_f32_file_holds_the_checkpoints_values(tmp_path: Path, spec: CheckpointSpec) -> None:
    convert(write_checkpoint(tmp_path / "c", spec), tmp_path / "m.gguf")
    found = {t.name: t.data.reshape(t.shape[::-1]) for t in GGUFReader(tmp_path / "m.gguf").tensors}
    expected = expected_tensors(spec)
    assert found.keys() == expected.keys()
    relative = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}[spec.dtype]
    for name, values in expected.items():
        np.testing.assert_allclose(
            found[name], values, rtol=relative, atol=1e-7 if relative else 0, err_msg=name
        )


@pytest.mark.parametrize("type", ("q4_0", "q8_0", "f16", "bf16", "f32"))  # the others are searched for
def test_stored_bytes_are_those_of_the_gguf_package(checkpoint: Path, tmp_path: Path, type: FileType) -> None:
    convert(checkpoint, tmp_path / "m.gguf", type)
    found = stored_bytes(tmp_path / "m.gguf")
    types = set()
    for name, values in expected_tensors(SPEC).items():
        kind, data = found[name]
        assert kind != "Q6_K"  # 256 does not divide 64
        assert data == gguf_quantize(np.ascontiguousarray(values), GGMLQuantizationType[kind]).tobytes(), name
        types.add(kind)
    assert type.upper() in types


def test_slices_of_rows_do_not_change_the_bytes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint, tmp_path / "whole.gguf", "q8_0")
    sizes = []

    def recording(values: NDArray[np.float32], *arguments: Any) -> NDArray[np.uint8]:
        sizes.append(values.size)
        return quantize(values, *arguments)

    monkeypatch.setattr("qwen2vl_q.convert.convert._CHUNK_VALUES", 1000)
    monkeypatch.setattr("qwen2vl_q.convert.convert.quantize", recording)
    convert(checkpoint, tmp_path / "sliced.gguf", "q8_0")
    assert (tmp_path / "sliced.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert max(sizes) <= 1000 < SPEC.vocab_size * SPEC.hidden_size


@pytest.mark.parametrize(
    ("type", "vision_type", "language", "head", "vision", "patch"),
    [
        ("q4_0", None, "Q4_0", "Q6_K", "Q8_0", "F16"),
        ("q8_0", None, "Q8_0", "Q8_0", "Q8_0", "F16"),
        ("f16", None, "F16", "F16", "F16", "F16"),
        ("bf16", None, "BF16", "BF16", "BF16", "BF16"),
        ("f32", None, "F32", "F32", "F32", "F32"),
        ("q4_0", "q4_0", "Q4_0", "Q6_K", "Q4_0", "F16"),
        ("q4_0", "bf16", "Q4_0", "Q6_K", "BF16", "BF16"),
        ("f32", "q8_0", "F32", "F32", "Q8_0", "F16"),
    ],
)
def test_recipe(
    tmp_path: Path,
    type: FileType,
    vision_type: FileType | None,
    language: str,
    head: str,
    vision: str,
    patch: str,
) -> None:
    source = write_checkpoint(tmp_path / "c", dataclasses.replace(LLAMA_CPP_SPEC, tie_word_embeddings=False))
    report = convert(source, tmp_path / "m.gguf", type, vision_type)
    types = {name: kind for name, (kind, _) in stored_bytes(tmp_path / "m.gguf").items()}
    for name, kind in types.items():
        if name.endswith(".bias") or "norm" in name or ".ln" in name or "post_ln" in name:
            assert kind == "F32", name
        elif name == "output.weight":
            assert kind == head, name
        elif "patch_embd" in name:
            assert kind == patch, name
        else:
            assert kind == (vision if name.startswith(("v.", "mm.")) else language), name
    assert all(t.wanted == t.output.type for t in report.tensors)


def test_rows_that_blocks_do_not_divide_fall_back(tmp_path: Path) -> None:
    report = convert(write_checkpoint(tmp_path / "c", ODD), tmp_path / "m.gguf", "q4_0")
    by_name = {t.output.name: (t.wanted, t.output.type) for t in report.tensors}
    assert by_name["output.weight"] == ("Q6_K", "F16")  # rows of 72
    assert by_name["blk.0.attn_q.weight"] == ("Q4_0", "F16")
    assert by_name["blk.1.ffn_down.weight"] == ("Q4_0", "F16")  # rows of 100
    assert by_name["v.blk.0.attn_q.weight"] == ("Q8_0", "F16")  # rows of 36
    assert by_name["blk.0.attn_norm.weight"] == ("F32", "F32")
    report = convert(write_checkpoint(tmp_path / "d", SPEC), tmp_path / "n.gguf", "q4_0")
    assert {t.output.type for t in report.tensors if t.wanted == "Q6_K"} == {"Q8_0"}  # rows of 64: 32 divides


def test_fallbacks_are_llama_cpps(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "c", SPEC)  # rows of 64 and 96
    for type, expected in (("q4_k_s", {"Q5_1", "Q5_0", "Q8_0"}), ("q5_k_m", {"Q5_1", "Q8_0"})):
        report = convert(source, tmp_path / "m.gguf", type)  # type: ignore[arg-type]
        language = {t.output.type for t in report.tensors if t.output.name.startswith("blk.")} - {"F32"}
        assert language == expected - ({"Q8_0"} if type == "q4_k_s" else set()), type


def test_names_and_keys_are_llama_cpps(tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parent / "data" / "llama_cpp_names.json").read_text())
    source = write_checkpoint(tmp_path / "Interop", LLAMA_CPP_SPEC)
    convert(source, tmp_path / "m.gguf", "f16")
    reader = GGUFReader(tmp_path / "m.gguf")
    found = {t.name: {"type": t.tensor_type.name, "shape": t.shape.tolist()} for t in reader.tensors}
    assert found == golden["language"]["tensors"] | golden["vision"]["tensors"]
    # The tower's file calls itself clip, and its feed_forward_length is wrong; our label counts both halves.
    expected = golden["vision"]["keys"] | golden["language"]["keys"]
    del expected["general.size_label"]
    expected["clip.vision.feed_forward_length"]["value"] = 512
    for key, described in expected.items():
        field = reader.fields[key]
        value = field.contents()
        if isinstance(value, (list, str)) and len(value) > 40:
            value = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        assert {"types": [t.name for t in field.types], "value": value} == described, key
    own = {key for key in reader.fields if not key.startswith("GGUF.")} - expected.keys()
    assert own == {
        "general.size_label",
        "clip.vision.spatial_merge_size",
        "clip.vision.image_min_pixels",
        "clip.vision.image_max_pixels",
    }


# --- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("type", "number"), [("f32", 0), ("f16", 1), ("q4_0", 2), ("q8_0", 7), ("bf16", 32)])
def test_file_type_numbers_are_llama_cpps(
    checkpoint: Path, tmp_path: Path, type: FileType, number: int
) -> None:
    convert(checkpoint, tmp_path / "m.gguf", type)
    assert keys_of(tmp_path / "m.gguf")["general.file_type"] == number


def test_sampling_is_greedy_without_do_sample(own_checkpoint: Path, tmp_path: Path) -> None:
    edit_json(own_checkpoint / "generation_config.json", do_sample=False, repetition_penalty=1.05)
    convert(own_checkpoint, tmp_path / "m.gguf")
    sampling = {k: v for k, v in keys_of(tmp_path / "m.gguf").items() if k.startswith("general.sampling.")}
    assert sampling == {
        "general.sampling.temp": 0.0,
        "general.sampling.penalty_repeat": pytest.approx(1.05),
    }


def test_newer_processor_files(own_checkpoint: Path, tmp_path: Path) -> None:
    settings = json.loads((own_checkpoint / "preprocessor_config.json").read_text())
    del settings["min_pixels"], settings["max_pixels"]
    settings["size"] = {"shortest_edge": 784, "longest_edge": 78400}
    (own_checkpoint / "preprocessor_config.json").unlink()
    (own_checkpoint / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    convert(own_checkpoint, tmp_path / "m.gguf")
    keys = keys_of(tmp_path / "m.gguf")
    assert (keys["clip.vision.image_min_pixels"], keys["clip.vision.image_max_pixels"]) == (784, 78400)


def test_what_transformers_leaves_out_of_a_config(own_checkpoint: Path, tmp_path: Path) -> None:
    """It drops what equals its own defaults; the tie is in text_config in files from before version 5."""
    config = json.loads((own_checkpoint / "config.json").read_text())
    for key in ("hidden_size", "spatial_merge_size", "temporal_patch_size", "patch_size", "mlp_ratio"):
        del config["vision_config"][key]
    text = {
        k: config.pop(k) for k in list(config) if k not in ("model_type", "architectures", "vision_config")
    }
    del text["use_sliding_window"], text["max_position_embeddings"], text["hidden_act"]
    config["text_config"] = text
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    convert(own_checkpoint, tmp_path / "m.gguf")
    keys = keys_of(tmp_path / "m.gguf")
    assert keys["qwen2vl.context_length"] == 32768
    assert keys["clip.vision.feed_forward_length"] == 4 * SPEC.embed_dim
    assert keys["qwen2vl.rope.freq_base"] == SPEC.rope_theta


def test_a_name_that_is_not_unicode(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "m.gguf", Recipe("f32"), name=os.fsdecode(b"\xffine"))
    assert keys_of(tmp_path / "m.gguf")["general.name"] == "?ine"


def test_names_of_models() -> None:
    assert model_name(Path("/x/Qwen2-VL-2B-Instruct")) == "Qwen2 VL 2B Instruct"
    assert model_name(Path("/c/models--Qwen--Qwen2-VL-2B/snapshots/0123abcd")) == "Qwen2 VL 2B"


def test_special_ids_that_are_none(own_checkpoint: Path, tmp_path: Path) -> None:
    edit_json(own_checkpoint / "tokenizer_config.json", pad_token=None, bos_token=None, eos_token=None)
    edit_json(own_checkpoint / "config.json", bos_token_id=None, eos_token_id=1 << 40)
    edit_json(own_checkpoint / "generation_config.json", pad_token_id=[True], bos_token_id=[1024, "x"])
    convert(own_checkpoint, tmp_path / "m.gguf")
    ids = {k: v for k, v in keys_of(tmp_path / "m.gguf").items() if k.endswith("_token_id")}
    assert ids == {"tokenizer.ggml.bos_token_id": 1024}


# --- tokenizer and template -----------------------------------------------------------------------------


def test_both_forms_of_the_tokenizer_give_the_same_keys(tmp_path: Path) -> None:
    keys = []
    for form in ("json", "vocab"):
        source = write_checkpoint(tmp_path / form, dataclasses.replace(SPEC, tokenizer=form))
        convert(source, tmp_path / f"{form}.gguf")
        keys.append(
            {k: v for k, v in keys_of(tmp_path / f"{form}.gguf").items() if k.startswith("tokenizer.")}
        )
    assert keys[0] == keys[1]
    tokens, types = keys[0]["tokenizer.ggml.tokens"], keys[0]["tokenizer.ggml.token_type"]
    assert tokens[1036:] == ["<|image_pad|>", "<|video_pad|>", "[PAD1038]", "[PAD1039]"]
    assert types == [1] * 1024 + [3] * 14 + [5] * 2


def test_merges_as_strings_and_tokens_of_the_user(own_checkpoint: Path, tmp_path: Path) -> None:
    convert(own_checkpoint, tmp_path / "pairs.gguf")
    path = own_checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    tokenizer["added_tokens"] += [{"id": 1038, "content": "<tool>", "special": False}]
    path.write_text(json.dumps(tokenizer))
    convert(own_checkpoint, tmp_path / "strings.gguf")
    pairs, strings = keys_of(tmp_path / "pairs.gguf"), keys_of(tmp_path / "strings.gguf")
    assert strings["tokenizer.ggml.merges"] == pairs["tokenizer.ggml.merges"]
    assert strings["tokenizer.ggml.tokens"][1038] == "<tool>"
    assert strings["tokenizer.ggml.token_type"][1036:] == [3, 3, 4, 5]


def test_templates_from_each_place(own_checkpoint: Path, tmp_path: Path) -> None:
    def templates() -> dict[str, Any]:
        report = convert(own_checkpoint, tmp_path / "m.gguf")
        assert bool(report.notes) == ("tokenizer.chat_template" not in keys_of(tmp_path / "m.gguf"))
        return {k: v for k, v in keys_of(tmp_path / "m.gguf").items() if "chat_template" in k}

    released = json.loads((TOKENIZER / "chat_template.json").read_text())["chat_template"]
    (own_checkpoint / "chat_template.jinja").write_text("from jinja\n")
    assert templates() == {"tokenizer.chat_template": "from jinja\n"}
    (own_checkpoint / "chat_template.jinja").unlink()
    assert templates() == {"tokenizer.chat_template": released}
    (own_checkpoint / "chat_template.json").unlink()
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template="from settings")
    assert templates() == {"tokenizer.chat_template": "from settings"}
    named = [{"name": "default", "template": "a"}, {"name": "tool-use", "template": "b"}]
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template=named)
    assert templates() == {
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template": "a",
        "tokenizer.chat_template.tool_use": "b",
    }
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template=named[1:])
    assert templates().keys() == {"tokenizer.chat_templates", "tokenizer.chat_template.tool_use"}
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template=None)
    assert templates() == {}
