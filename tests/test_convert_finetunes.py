"""What fine-tunes bring beside plain Qwen2-VL: keys, tokens, heads, other ways to write the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, random_tensors, write_checkpoint, write_safetensors
from conversion import convert, edit_json, keys_of
from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import FormatError

SPEC = CheckpointSpec()
Tensors = dict[str, NDArray[Any]]


@pytest.fixture
def own_checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", SPEC)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of the checkpoint as it is."""
    folder = tmp_path_factory.mktemp("plain")
    convert(write_checkpoint(folder / "checkpoint", SPEC), folder / "m.gguf")
    return (folder / "m.gguf").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"visual_token_budget": 1344, "lm_skip_ratio": 0, "ui_graph": {"a": [1]}, "name": "showui"},
        {"use_sliding_window": True},  # from a layer on that the model does not have
        {"layer_types": ["full_attention"] * 2, "sliding_window": None, "max_window_layers": 0},
        {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        {"rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 3, 3]}},
        {
            "rope_scaling": None,
            "rope_theta": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
        },
        {"pad_token_id": None, "transformers_version": "4.41.2", "auto_map": {"AutoModel": "x.y"}},
        {"architectures": ["ColQwen2"], "quantization_config": None},
    ],
    ids=str,
)
def test_keys_that_do_not_matter(
    own_checkpoint: Path, tmp_path: Path, plain: bytes, changes: dict[str, Any]
) -> None:
    edit_json(own_checkpoint / "config.json", **changes)
    convert(own_checkpoint, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == plain


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_newer_layouts(tmp_path: Path, tied: bool) -> None:
    files = []
    flat = dataclasses.replace(SPEC, tie_word_embeddings=tied)
    for i, spec in enumerate((flat, dataclasses.replace(flat, layout="nested", naming="nested"))):
        convert(write_checkpoint(tmp_path / str(i) / "checkpoint", spec), tmp_path / "m.gguf")
        files.append((tmp_path / "m.gguf").read_bytes())
    assert files[0] == files[1]


def test_the_tie_in_text_config_counts(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "c", dataclasses.replace(SPEC, layout="nested"))
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = False, True
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "m.gguf")
    assert "output.weight" not in {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}


def test_tokens_beyond_the_base_vocabulary(tmp_path: Path) -> None:
    """As GUI-Actor adds its pointers: the embedding grew with them."""
    source = write_checkpoint(tmp_path / "c", dataclasses.replace(SPEC, vocab_size=1043))
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = ["<|pointer_start|>", "<|pointer_end|>", "<|pointer_pad|>"]
    tokenizer["added_tokens"] += [
        {"id": 1040 + i, "content": token, "special": i < 2} for i, token in enumerate(added)
    ]
    path.write_text(json.dumps(tokenizer))
    convert(source, tmp_path / "m.gguf")
    with Qwen2VL.from_gguf(tmp_path / "m.gguf") as model:
        ids = model.tokenizer.encode_pieces([(token, True) for token in added])
        assert ids == [1040, 1041, 1042]
        assert model.logits(ids).shape == (3, 1043)


@pytest.mark.parametrize("pad", [1034, 1024, -1, None, 1 << 40, "x", [1024]])
def test_padding_tokens_of_all_kinds(own_checkpoint: Path, tmp_path: Path, pad: object) -> None:
    """151654, the end of a picture, in some; -1 or none in others."""
    edit_json(own_checkpoint / "tokenizer_config.json", pad_token=None)
    edit_json(own_checkpoint / "generation_config.json", pad_token_id=None)
    edit_json(own_checkpoint / "config.json", pad_token_id=pad)
    convert(own_checkpoint, tmp_path / "m.gguf")
    found = keys_of(tmp_path / "m.gguf").get("tokenizer.ggml.padding_token_id")
    assert found == (pad if pad in (1034, 1024) else None)


def test_a_base_model_without_a_template(own_checkpoint: Path, tmp_path: Path) -> None:
    (own_checkpoint / "chat_template.json").unlink()
    edit_json(own_checkpoint / "tokenizer_config.json", chat_template=None)
    report = convert(own_checkpoint, tmp_path / "m.gguf")
    assert report.notes == ["the checkpoint has no chat template: Qwen2-VL's own is used"]


def test_a_template_with_variables(own_checkpoint: Path, tmp_path: Path) -> None:
    """NuExtract's kind. The variables' texts never become special tokens."""
    (own_checkpoint / "chat_template.jinja").write_text(
        "<|im_start|>{{ template }}{% for e in examples or [] %}{{ e }}{% endfor %}<|im_end|>"
    )
    convert(own_checkpoint, tmp_path / "m.gguf")
    messages = [{"role": "user", "content": "x"}]
    variables = {"template": "a<|im_end|>", "examples": ["b"]}
    with Qwen2VL.from_gguf(tmp_path / "m.gguf") as model:
        ids, _ = model.encode_chat(messages, chat_template_kwargs=variables)
        assert model.tokenizer.decode(ids[1:-1]) == "a<|im_end|>b"
        assert ids.count(1026) == 1
        answers = [
            model.chat(messages, stream=False, max_new_tokens=4, chat_template_kwargs=kwargs)
            for kwargs in (variables, variables, None)
        ]
        assert answers[0] == answers[1]
        with pytest.raises(ValueError, match="'messages' is the template's own"):
            model.chat(messages, chat_template_kwargs={"messages": []})


# --- heads ----------------------------------------------------------------------------------------------


def with_tensors(folder: Path, **extra: NDArray[Any]) -> None:
    named = {name.replace("__", "."): values for name, values in extra.items()}
    write_safetensors(folder / "model.safetensors", random_tensors(SPEC, 0) | named)


def test_linear_heads_are_kept(own_checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    projection, score = rng.standard_normal((128, 64)), rng.standard_normal((1, 64))
    bias = rng.standard_normal(128).astype(np.float32)
    with_tensors(
        own_checkpoint,
        custom_text_proj__weight=projection.astype(np.float32),
        custom_text_proj__bias=bias,
        score__weight=score.astype(np.float32),
    )
    report = convert(own_checkpoint, tmp_path / "m.gguf", "q4_0")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    for name, values in (
        ("head.custom_text_proj.weight", projection.astype(np.float32)),
        ("head.custom_text_proj.bias", bias),
        ("head.score.weight", score.astype(np.float32)),
    ):
        assert tensors[name].tensor_type.name == "F32"
        np.testing.assert_array_equal(tensors[name].data, values)
    assert keys_of(tmp_path / "m.gguf")["qwen2vl.heads"] == ["custom_text_proj", "score"]
    assert report.notes == [
        "custom_text_proj, a linear map of the hidden states, is kept as head.custom_text_proj",
        "score, a linear map of the hidden states, is kept as head.score",
    ]
    with Qwen2VL.from_gguf(tmp_path / "m.gguf") as model:
        assert model.logits([1, 2]).shape == (2, SPEC.vocab_size)


def test_other_heads_are_dropped_with_a_word(own_checkpoint: Path, tmp_path: Path, plain: bytes) -> None:
    square = np.zeros((64, 64), np.float32)
    with_tensors(
        own_checkpoint,
        multi_patch_pointer_head__projection_enc__0__weight=square,
        multi_patch_pointer_head__self_attention__in_proj_weight=square,
        score__0__weight=square,  # jina's reranker: two layers and what is between them
        score__2__weight=square[:1],
        proj__weight=np.zeros((128, 63), np.float32),  # not of the hidden states
        table__weight=square,
        table__buffer=square,
    )
    report = convert(own_checkpoint, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == plain
    assert report.notes == [
        f"{name} ({count} tensors) is not written: it is no linear map of hidden states"
        for name, count in (("multi_patch_pointer_head", 2), ("score", 2), ("proj", 1), ("table", 2))
    ]


def test_what_is_inside_the_model_is_no_head(own_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("model__score__weight", "visual__score__weight", "lm_head__bias", "score"):
        with_tensors(own_checkpoint, **{name: np.zeros((1, 64), np.float32)})
        with pytest.raises(FormatError, match=rf"unexpected: {name.replace('__', '.')} \[1, 64\]"):
            convert(own_checkpoint, tmp_path / "m.gguf")


def test_a_head_of_another_type_or_bias(own_checkpoint: Path, tmp_path: Path) -> None:
    with_tensors(own_checkpoint, score__weight=np.zeros((2, 64), np.int32))
    with pytest.raises(FormatError, match=r"type: score\.weight \[2, 64\] is I32, expected F32, F16 or BF16"):
        convert(own_checkpoint, tmp_path / "m.gguf")
    weight, bias = np.zeros((2, 64), np.float32), np.zeros(3, np.float32)
    with_tensors(own_checkpoint, score__weight=weight, score__bias=bias)
    with pytest.raises(FormatError, match=r"misshapen: score\.bias \[3\], expected \[2\]"):
        convert(own_checkpoint, tmp_path / "m.gguf")


def test_transformers_own_colqwen2(tmp_path: Path) -> None:
    """A wrapper around the whole model: config.json nests it, names begin with vlm."""
    source = write_checkpoint(tmp_path / "c", SPEC)
    config = json.loads((source / "config.json").read_text())
    wrapper = {"model_type": "colqwen2", "embedding_dim": 128, "vlm_config": config}
    (source / "config.json").write_text(json.dumps(wrapper))
    tensors: Tensors = {f"vlm.{name}": values for name, values in random_tensors(SPEC, 0).items()}
    tensors["embedding_proj_layer.weight"] = np.ones((128, 64), np.float32)
    write_safetensors(source / "model.safetensors", tensors)
    convert(source, tmp_path / "m.gguf")
    assert keys_of(tmp_path / "m.gguf")["qwen2vl.heads"] == ["embedding_proj_layer"]
