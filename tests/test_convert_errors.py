"""What the converter refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import CheckpointSpec, random_tensors, write_checkpoint, write_safetensors
from conversion import convert, edit_json, stored_bytes
from qwen2vl_q.base.errors import FormatError, UnsupportedError

SPEC = CheckpointSpec()


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return write_checkpoint(tmp_path / "checkpoint", SPEC)


def test_tensor_problems_are_listed_and_counted(own_checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    del tensors["visual.merger.ln_q.bias"], tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    tensors["visual.blocks.0.attn.qkv.weight"] = tensors["visual.blocks.0.attn.qkv.weight"].T
    tensors["model.layers.0.lora_A"] = np.zeros((2, 3), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)  # of old files: ignored
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"5 tensors do not fit config\.json") as error:
        convert(own_checkpoint, tmp_path / "m.gguf")
    assert str(error.value).endswith(
        ": missing: model.layers.1.self_attn.k_proj.bias [32]; missing: visual.merger.ln_q.bias [64]; "
        "misshapen: model.norm.weight [63], expected [64]; and 2 more"
    )
    assert not (tmp_path / "m.gguf").exists()


def test_tensors_of_other_names_and_types(own_checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    tensors["model.layers.0.lora_A"] = np.zeros((2, 3), np.float32)
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    message = r"1 tensors .*: unexpected: model\.layers\.0\.lora_A \[2, 3\] in model\.safetensors$"
    with pytest.raises(FormatError, match=message):
        convert(own_checkpoint, tmp_path / "m.gguf")
    tensors["x" * 5000] = tensors.pop("model.layers.0.lora_A")
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"unexpected: x{80}\.\.\. \(5000 in all\) \[2, 3\] in"):
        convert(own_checkpoint, tmp_path / "m.gguf")
    data = (write_checkpoint(tmp_path / "d", SPEC) / "model.safetensors").read_bytes()
    (own_checkpoint / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(FormatError, match=r"type: model.embed_tokens.weight .* is I32, expected F32, F16 or"):
        convert(own_checkpoint, tmp_path / "m.gguf")


def test_a_tied_head_that_was_saved_is_left_out(own_checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    report = convert(own_checkpoint, tmp_path / "m.gguf")
    assert "output.weight" not in stored_bytes(tmp_path / "m.gguf")
    assert report.notes == ["lm_head.weight is not written: config.json ties the head to the embeddings"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"model_type": "qwen2_5_vl"},
            UnsupportedError,
            "model_type: expected 'qwen2_vl', found 'qwen2_5_vl'",
        ),
        ({"model_type": None}, UnsupportedError, "found None"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "bits: expected 4, found None"),
        ({"quantization_config": "x"}, FormatError, "quantization_config: expected an object, found 'x'"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act: only 'silu' is supported, found 'gelu'"),
        (
            {"use_sliding_window": True, "max_window_layers": 1},
            UnsupportedError,
            "use_sliding_window: only F",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            UnsupportedError,
            "layer_types: only 'full",
        ),
        (
            {"layer_types": "x"},
            UnsupportedError,
            "layer_types: only 'full_attention' is supported, found 'x'",
        ),
        ({"model_type": "colqwen2"}, UnsupportedError, "model_type: expected 'qwen2_vl', found None"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, UnsupportedError, "'yarn'"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}},
            FormatError,
            "sum head_dim / 2 = 8",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": "x"}}, FormatError, "three integers, found 'x'"),
        ({"rope_scaling": None}, FormatError, "mrope_section"),
        ({"rope_scaling": 3}, FormatError, "rope_scaling: expected an object, found 3"),
        ({"head_dim": 32}, UnsupportedError, "head_dim: only hidden_size / num_attention_heads = 16"),
        ({"hidden_size": 66}, FormatError, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        (
            {"hidden_size": "64"},
            FormatError,
            "hidden_size: expected an integer from 1 to 1048576, found '64'",
        ),
        ({"num_hidden_layers": 10**9}, FormatError, "num_hidden_layers: expected an integer from 1 to 1024"),
        ({"num_key_value_heads": 3}, FormatError, "num_key_value_heads 3"),
        (
            {"num_attention_heads": 4097},
            FormatError,
            "num_attention_heads: expected .* 1 to 4096, found 4097",
        ),
        (
            {"num_key_value_heads": 4097},
            FormatError,
            "num_key_value_heads: expected .* 1 to 4096, found 4097",
        ),
        ({"rms_norm_eps": -1}, FormatError, r"rms_norm_eps: expected a number in \(0, 1\), found -1"),
        ({"tie_word_embeddings": "no"}, FormatError, "tie_word_embeddings: expected true or false"),
        ({"tie_word_embeddings": False}, FormatError, r"missing: lm_head.weight \[1040, 64\]"),
        ({"vision_config": []}, FormatError, "vision_config: expected an object"),
        ({"image_token_id": 5}, FormatError, r"image_token_id: expected 1036, the id of <\|image_pad\|>"),
        ({"vocab_size": 1037}, FormatError, r"model.embed_tokens.weight \[1040, 64\], expected \[1037, 64\]"),
    ],
)
def test_configurations_that_are_refused(
    own_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_json(own_checkpoint / "config.json", **changes)
    with pytest.raises(error, match=message) as raised:
        convert(own_checkpoint, tmp_path / "m.gguf")
    assert str(own_checkpoint) in str(raised.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temporal_patch_size": 3}, "temporal_patch_size: only 2 is supported"),
        ({"hidden_act": "gelu"}, "hidden_act: only 'quick_gelu'"),
        ({"hidden_size": 32}, "vision_config.hidden_size: expected the language model's 64, found 32"),
        ({"num_heads": 5}, "vision embed_dim 64 is not a multiple of 4 num_heads 20"),
        ({"num_heads": 4097}, "num_heads: expected an integer from 1 to 4096, found 4097"),
        ({"in_channels": 4}, "in_channels: only 3 is supported, found 4"),
        ({"patch_size": 1025}, "patch_size: expected an integer from 1 to 1024, found 1025"),
        ({"spatial_merge_size": 17}, "spatial_merge_size: expected an integer from 1 to 16, found 17"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 5.0}}, "rope_theta: only 10000.0"),
    ],
)
def test_vision_configurations_that_are_refused(
    own_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((own_checkpoint / "config.json").read_text())
    edit_json(own_checkpoint / "config.json", vision_config=config["vision_config"] | changes)
    with pytest.raises((FormatError, UnsupportedError), match=message):
        convert(own_checkpoint, tmp_path / "m.gguf")


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / name, **changes)


def folder_in_place_of(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def edit_vocabulary(**tokens: int) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"] |= tokens
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    return damage


def unknown_merge(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].append(["zz", "zz"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def nan(folder: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = np.nan
    write_safetensors(folder / "model.safetensors", tensors)


def link_out(shard: object) -> Callable[[Path], object]:
    return index(json.dumps({"weight_map": {"model.norm.weight": shard}}))


def index(text: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def empty_tensor(*shape: int) -> Callable[[Path], None]:
    """In a file that safetensors takes for sound."""
    text = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_tensor(1 << 63, 0), r"'lm_head.weight': expected up to 8 axes and 2\^48 values, found \[9"),
        (empty_tensor(*[0] * 100), r"'lm_head.weight': expected up to 8 axes and .*\.\.\. \(300 in all\)$"),
        (remove("config.json"), "no config.json, so this is not a Hugging Face checkpoint"),
        (write("config.json", "{"), "config.json: not valid JSON"),
        (write("config.json", "[" * 100000), "config.json: not valid JSON"),
        (write("config.json", "[]"), "config.json: expected a JSON object, found list"),
        (remove("model.safetensors"), "neither model.safetensors nor model.safetensors.index.json"),
        (truncate, "model.safetensors: not a sound safetensors file"),
        (write("model.safetensors", "x"), "model.safetensors: not a sound safetensors file"),
        (nan, "tensor 'model.layers.0.mlp.up_proj.weight' holds values that are not finite"),
        (link_out("../secret.safetensors"), "the same folder, found '../secret.safetensors'"),
        (link_out("/etc/x.safetensors"), "the same folder, found '/etc/x.safetensors'"),
        (link_out("..\\x.safetensors"), "the same folder"),
        (link_out("passwd"), "expected the name of a safetensors file"),
        (link_out(3), "expected the name of a safetensors file"),
        (link_out("\x1b[2J.safetensors"), r"the same folder, found '\\x1b\[2J.safetensors'"),
        (link_out("x" * 300 + ".safetensors"), r"the same folder, found 'x+\.\.\. \(312 in all\)'"),
        (folder_in_place_of("model.safetensors"), "neither model.safetensors nor"),
        (link_out("model-2.safetensors"), "1 of 1 files are missing: model-2.safetensors"),
        (
            index(json.dumps({"weight_map": {str(i): f"{i:03}.safetensors" for i in range(500)}})),
            r"500 of 500 files are missing: 000.safetensors, 001.safetensors, .*\.\.\. \(\d+ in all\)$",
        ),
        (index("{}"), "expected an object 'weight_map'"),
        (remove("tokenizer.json"), "neither tokenizer.json nor vocab.json with merges.txt"),
        (edit_vocabulary(**{"": 1038}), r"tokenizer.json: expected a token and its id, found '': 1038"),
        (
            edit_vocabulary(**{"\ud800": 1038}),
            r"tokenizer.json: expected a token and its id, found '\\ud800'",
        ),
        (unknown_merge, r"tokenizer.json: tokenizer.merges: merge \d+ .*zz zz.* does not join"),
        (edit("tokenizer.json", added_tokens=[{"id": 1038, "content": "\ud800"}]), "expected an added token"),
        (edit("tokenizer.json", model={"type": "Unigram"}), "tokenizer.json: expected a model of type BPE"),
        (edit("tokenizer.json", pre_tokenizer={"type": "ByteLevel"}), "expected Qwen2's split pattern"),
        (edit("tokenizer.json", added_tokens=[{"id": -1, "content": "x"}]), "expected an added token"),
        (
            edit("tokenizer.json", added_tokens=[{"id": 0, "content": "x"}]),
            "id 0 is both '!' and the added token 'x'",
        ),
        (edit("tokenizer.json", added_tokens=[{"id": 1040, "content": "x"}]), "token id 1040 has no row"),
        *(
            (
                edit("tokenizer_config.json", added_tokens_decoder={id: {"content": "y"}}),
                "tokenizer_config.json: expected an added token",
            )
            for id in ("x", "9" * 5000)
        ),
        (
            edit("chat_template.json", chat_template=3),
            "chat_template.json: chat_template: expected a template",
        ),
        *(
            (edit("chat_template.json", chat_template=odd), "chat_template: expected a template or a list")
            for odd in (
                [{"name": [], "template": "x"}],
                [{"name": "x"}],
                ["x"],
                [],
                {},
                {"default": [1]},
                "\ud800",
            )
        ),
        (
            edit("chat_template.json", chat_template={"x" * 101: "x"}),
            "chat_template: expected a template or a list",
        ),
        (
            lambda folder: os.truncate(folder / "tokenizer.json", 2**28 + 1),
            "expected at most 268435456 bytes",
        ),
        (
            edit("tokenizer.json", model={"vocab": {"a": 0}, "merges": []}),
            "merges: expected a list of merges",
        ),
        (remove("preprocessor_config.json"), "neither preprocessor_config.json nor processor_config.json"),
        (edit("preprocessor_config.json", max_pixels=None), r"max_pixels \(or size.longest_edge\): expected"),
        (edit("preprocessor_config.json", patch_size=16), "patch_size: expected config.json's 14, found 16"),
        (edit("preprocessor_config.json", image_mean=[1]), "image_mean: expected three numbers"),
        (edit("generation_config.json", top_p="x"), "top_p: expected a number"),
    ],
)
def test_damaged_checkpoints(
    own_checkpoint: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(own_checkpoint)
    with pytest.raises((FormatError, UnsupportedError), match=message) as raised:
        convert(own_checkpoint, tmp_path / "m.gguf")
    assert str(own_checkpoint) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("config.json", rms_norm_eps=5), r"config\.json: rms_norm_eps: expected a number in \(0, 1\)"),
        (edit("config.json", rms_norm_eps=1e-50), r"config\.json: rms_norm_eps: expected .* found 1e-50"),
        (edit("config.json", rope_theta=True), r"config\.json: rope_theta: expected .* found True"),
        (edit("config.json", rope_theta=1e39), r"config\.json: rope_theta: expected a positive number"),
        (
            edit("config.json", max_position_embeddings=1 << 25),
            r"config\.json: max_position_embeddings: expe",
        ),
        (edit("preprocessor_config.json", min_pixels=20000000), r"preprocessor_config\.json: .*min_pixels"),
        (edit("preprocessor_config.json", image_std=[0.5, 0, 1]), r"preprocessor_config\.json: .*deviations"),
        (edit("preprocessor_config.json", image_mean=[0, 0, 1e39]), r"preprocessor_config\.json: image_mean"),
        (edit("generation_config.json", temperature=1e39), r"generation_config\.json: temperature: expected"),
        (edit("generation_config.json", top_p=7), r"generation_config\.json: .*top_p: expected .* found 7"),
        (edit("generation_config.json", min_p=1.5), r"generation_config\.json: .*min_p: expected"),
        (edit("generation_config.json", top_k=1 << 31), r"generation_config\.json: top_k: expected"),
        (edit("generation_config.json", top_k=True), r"generation_config\.json: top_k: expected"),
        (edit("preprocessor_config.json", min_pixels=True), r"preprocessor_config\.json: min_pixels"),
        (edit("generation_config.json", repetition_penalty=0), r"generation_config\.json: .*penalty"),
        (
            edit("chat_template.json", chat_template="{% for m in messages %}"),
            r"chat_template\.json: chat_template: line 1: Unexpected end",
        ),
        (write("chat_template.jinja", "{{ x"), r"chat_template\.jinja: chat_template: line 1"),
        (write("chat_template.jinja", "x" * 2**20), r"jinja: chat_template: expected at most 262144 char"),
    ],
)
def test_what_the_runtime_would_refuse(
    own_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    damage(own_checkpoint)
    monkeypatch.setattr("qwen2vl_q.convert.convert.quantize", None)  # before the work, not after
    with pytest.raises((FormatError, UnsupportedError), match=message):
        convert(own_checkpoint, tmp_path / "m.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_the_written_head_passes_the_runtimes_checks(
    own_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the converter itself lets through is refused before the tensors are quantized, too."""
    monkeypatch.setattr("qwen2vl_q.convert.config._MAX_CONTEXT", 1 << 30)
    monkeypatch.setattr("qwen2vl_q.convert.convert.quantize", None)
    edit_json(own_checkpoint / "config.json", max_position_embeddings=1 << 25)
    out = tmp_path / "m.gguf"
    out.write_text("the one before")
    with pytest.raises(FormatError, match=r"config\.json: the runtime refuses .*qwen2vl\.context_length"):
        convert(own_checkpoint, out)
    assert out.read_text() == "the one before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "m.gguf"]


def test_the_same_tensor_in_both_styles(own_checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"]
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"'model\.language_model\.norm\.weight' is also in"):
        convert(own_checkpoint, tmp_path / "m.gguf")


def test_values_beyond_f16(own_checkpoint: Path, tmp_path: Path) -> None:
    tensors = random_tensors(SPEC, 0)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -1e5
    write_safetensors(own_checkpoint / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=r"F16 reaches to 65504, found 100000: convert to bf16 or f32"):
        convert(own_checkpoint, tmp_path / "m.gguf", "f16")
    convert(own_checkpoint, tmp_path / "m.gguf", "bf16")
