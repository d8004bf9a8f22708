"""GPTQ and AWQ checkpoints: what is kept, what is quantized anew, what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

from checkpoints import Array, CheckpointSpec, write_checkpoint, write_safetensors
from conversion import convert, edit_json, keys_of
from packers import (
    PackSpec,
    pack,
    random_matrix,
    unpacked_tensors,
    write_bitsandbytes_checkpoint,
    write_packed_checkpoint,
)
from qwen2vl_q._native import quantize
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.convert import FileType, Recipe, Report, convert_checkpoint, default_recipe

SPEC = CheckpointSpec()
WIDE = CheckpointSpec(  # groups of 128
    hidden_size=256, intermediate_size=640, mrope_section=(8, 12, 12), num_hidden_layers=1, dtype="F16"
)
Tensors = dict[str, NDArray[Any]]
GPTQ_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def keep(source: Path, out: Path) -> Report:
    return convert_checkpoint(source, out, default_recipe(source), overwrite=True)


def written(path: Path, matrices: Iterable[str]) -> dict[str, tuple[str, Array]]:
    """The type and the values, by the gguf package, of what the packed weights became."""
    tensors = {t.name: t for t in GGUFReader(path).tensors}
    found = {}
    for name in matrices:
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        tensor = tensors[f"blk.{layer}.{GPTQ_NAMES[module]}.weight"]
        found[name] = (tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type))
    return found


KEPT = {
    "Int4": (SPEC, PackSpec(), "Q4_0"),
    "Int4 of 128": (WIDE, PackSpec(group_size=128), "Q4_0"),
    "Int4 by the row": (SPEC, PackSpec(group_size=-1), "Q4_0"),
    "Int4 without g_idx": (SPEC, PackSpec(g_idx=False), "Q4_0"),
    "Int4 of the second format": (SPEC, PackSpec(layout="gptq_v2"), "Q4_0"),
    "Int4 with zero points": (SPEC, PackSpec(symmetric=False), "Q5_0"),
    "Int4 with zero points of the second format": (
        WIDE,
        PackSpec(symmetric=False, group_size=128, layout="gptq_v2"),
        "Q5_0",
    ),
    "Int8": (SPEC, PackSpec(bits=8), "Q8_0"),
    "Int8 of 128": (WIDE, PackSpec(bits=8, group_size=128), "Q8_0"),
    "AWQ": (SPEC, PackSpec("awq", symmetric=False), "Q5_0"),
    "AWQ of 128": (WIDE, PackSpec("awq", symmetric=False, group_size=128), "Q5_0"),
    "AWQ by the row": (SPEC, PackSpec("awq", symmetric=False, group_size=-1), "Q5_0"),
    # Groups of three blocks, the last one shorter, as where the feed-forward is not padded.
    "a shorter last group": (SPEC, PackSpec(group_size=96), "Q4_0"),
    "a nested config, empty biases": (
        dataclasses.replace(SPEC, layout="nested"),
        PackSpec(empty_biases=True),
        "Q4_0",
    ),
}


@pytest.mark.parametrize(("spec", "packs", "type"), KEPT.values(), ids=KEPT)
def test_integers_are_kept(tmp_path: Path, spec: CheckpointSpec, packs: PackSpec, type: str) -> None:
    matrices = write_packed_checkpoint(tmp_path / "c", spec, packs)
    report = keep(tmp_path / "c", tmp_path / "m.gguf")
    for name, (kind, values) in written(tmp_path / "m.gguf", matrices).items():
        assert kind == type, name
        np.testing.assert_array_equal(values, matrices[name].weights, err_msg=name)
    kind = f"{packs.method.upper()} {packs.bits} bit"
    assert f"{kind}: {len(matrices)} of language model matrix kept as {type}: nothing lost" in report.notes
    assert keys_of(tmp_path / "m.gguf")["general.file_type"] == {"Q4_0": 2, "Q8_0": 7, "Q5_0": 8}[type]
    types = {t.output.name: t.output.type for t in report.tensors}
    assert types["v.blk.0.attn_q.weight"] == "Q8_0"
    assert types["token_embd.weight"] == ("Q6_K" if spec is WIDE and type != "Q8_0" else "Q8_0")


def test_slices_of_rows_do_not_change_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("gptq", "awq"):
        write_packed_checkpoint(tmp_path / method, SPEC, PackSpec(method, symmetric=False))
        keep(tmp_path / method, tmp_path / "whole.gguf")
        with monkeypatch.context() as patch:
            patch.setattr("qwen2vl_q.convert.convert._CHUNK_VALUES", 1000)  # 15 rows: no multiple of a word
            keep(tmp_path / method, tmp_path / "sliced.gguf")
        assert (tmp_path / "sliced.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def relative_error(values: Array, weights: Array) -> float:
    return float(np.sqrt(np.square(values - weights).sum() / np.square(weights).sum()))


SEVERAL = " (a block's columns are of several groups)"
ANEW = {
    "act-order": (PackSpec(act_order=True), None, "Q8_0", SEVERAL),
    "act-order of 8 bits": (PackSpec(act_order=True, bits=8), None, "Q8_0", SEVERAL),
    "act-order, asked for 4 bits": (PackSpec(act_order=True), "q4_0", "Q4_0", SEVERAL),
    "8 bits with zero points": (
        PackSpec(bits=8, symmetric=False),
        None,
        "Q8_0",
        " (integers of more than 8 bits)",
    ),
    "groups of half a block": (PackSpec(group_size=16), None, "Q8_0", SEVERAL),
    "asked for 4 bits": (PackSpec(symmetric=False), "q4_0", "Q4_0", ""),
    "8 to 4 bits": (PackSpec(bits=8), "q4_0", "Q4_0", ""),
    "asked for f16": (PackSpec(), "f16", "F16", ""),
}


@pytest.mark.parametrize(("packs", "asked", "type", "why"), ANEW.values(), ids=ANEW)
def test_what_is_quantized_anew(tmp_path: Path, packs: PackSpec, asked: Any, type: str, why: str) -> None:
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, packs)
    out = tmp_path / "m.gguf"
    report = convert(tmp_path / "c", out, asked) if asked else keep(tmp_path / "c", out)
    worst = 0.0
    raw = {t.name: t.data for t in GGUFReader(out).tensors}
    for name, (kind, values) in written(out, matrices).items():
        assert kind == type
        worst = max(worst, relative_error(values, matrices[name].weights))
    first = raw["blk.0.attn_q.weight"].view(np.uint8)
    weights = matrices["model.layers.0.self_attn.q_proj.weight"].weights
    np.testing.assert_array_equal(first.reshape(64, -1), quantize(weights, type))
    [note] = report.notes
    kind = f"GPTQ {packs.bits} bit"
    assert note == (
        f"{kind}: 14 of language model matrix quantized anew to {type}{why}: relative error up to {worst:.2g}"
    )
    assert 0 < worst < {"Q8_0": 0.01, "Q4_0": 0.2, "F16": 1e-3}[type]
    assert max(d.relative for d in report.differences.values()) == pytest.approx(worst, rel=1e-5)


@pytest.mark.parametrize(("asked", "kind"), [("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("f32", "F32")])
def test_a_type_that_was_asked_for_and_holds_the_integers(tmp_path: Path, asked: Any, kind: str) -> None:
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    report = convert(tmp_path / "c", tmp_path / "m.gguf", asked)
    for name, (type, values) in written(tmp_path / "m.gguf", matrices).items():
        assert type == kind
        np.testing.assert_array_equal(values, matrices[name].weights)
    assert report.notes[0].endswith(f"{kind}: nothing lost")


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name] = tensors[name].astype(np.float32) * np.float32(1.0001)
    write_safetensors(tmp_path / "c" / "model.safetensors", tensors)
    report = keep(tmp_path / "c", tmp_path / "m.gguf")
    for name, (kind, values) in written(tmp_path / "m.gguf", matrices).items():
        assert kind == "Q4_0"
        np.testing.assert_allclose(values, matrices[name].weights * 1.0001, rtol=2**-11)
    assert "kept as Q4_0: relative error up to 0.00" in report.notes[0]


def test_a_packed_tower_and_head(tmp_path: Path) -> None:
    """Of the fused q, k and v each gets its rows; --vision-type counts for the tower."""
    spec = dataclasses.replace(SPEC, tie_word_embeddings=False)
    folder, packs = tmp_path / "c", PackSpec("awq", symmetric=False)
    write_packed_checkpoint(folder, spec, packs)
    tensors: Tensors = dict(load_file(folder / "model.safetensors"))
    matrices = {}
    for module, rows in (("visual.blocks.1.attn.qkv", 192), ("lm_head", 1040)):
        matrices[module] = random_matrix(np.random.default_rng(rows), rows, 64, packs)
        del tensors[f"{module}.weight"]
        tensors |= pack(module, matrices[module], packs)
    write_safetensors(folder / "model.safetensors", tensors)
    choices: list[tuple[FileType | None, str]] = [(None, "Q5_0"), ("f32", "F32")]
    for vision_type, kind in choices:
        convert_checkpoint(folder, tmp_path / "m.gguf", default_recipe(folder, vision_type), overwrite=True)
        found = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
        parts = [found[f"v.blk.1.attn_{name}.weight"] for name in "qkv"]
        assert {t.tensor_type.name for t in parts} == {kind}
        values = np.concatenate([dequantize(t.data, t.tensor_type) for t in parts])
        np.testing.assert_array_equal(values, matrices["visual.blocks.1.attn.qkv"].weights)
        head = found["output.weight"]
        assert head.tensor_type.name == "Q5_0"
        np.testing.assert_array_equal(dequantize(head.data, head.tensor_type), matrices["lm_head"].weights)


def test_a_padded_feed_forward(tmp_path: Path) -> None:
    """The 72B's: config.json counts the padding, whose weights are zeros."""
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    padded = dataclasses.replace(SPEC, intermediate_size=192)
    wide = write_packed_checkpoint(tmp_path / "d", padded, PackSpec())
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    down = "model.layers.0.mlp.down_proj"
    tensors[f"{down}.qweight"][160 // 8 :] = 0x88888888 - (1 << 32)
    write_safetensors(tmp_path / "d" / "model.safetensors", tensors)
    keep(tmp_path / "d", tmp_path / "m.gguf")
    values = written(tmp_path / "m.gguf", wide)[f"{down}.weight"][1]
    assert values.shape == (64, 192)
    assert not values[:, 160:].any()
    np.testing.assert_array_equal(values[:, :160], wide[f"{down}.weight"].weights[:, :160])
    assert matrices.keys() == wide.keys()


def test_quantize_config_beside_it(tmp_path: Path) -> None:
    """As auto-gptq wrote it before transformers knew of it."""
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    edit_json(tmp_path / "c" / "config.json", quantization_config=None)
    with pytest.raises(FormatError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        keep(tmp_path / "c", tmp_path / "m.gguf")
    (tmp_path / "c" / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    keep(tmp_path / "c", tmp_path / "m.gguf")
    assert {kind for kind, _ in written(tmp_path / "m.gguf", matrices).values()} == {"Q4_0"}


def test_biases_that_the_writers_add(tmp_path: Path) -> None:
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec(empty_biases=True))
    report = keep(tmp_path / "c", tmp_path / "m.gguf")
    assert report.notes[-1] == "8 biases of zeros, which the model does not have, are left out"
    assert "blk.0.ffn_up.bias" not in {t.name for t in GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(matrices) == 14
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.bias"][3] = 1
    write_safetensors(tmp_path / "c" / "model.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=r"model\.safetensors: tensor '.*up_proj\.bias': .* no bias"):
        keep(tmp_path / "c", tmp_path / "m.gguf")


# --- refusals -------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def change(name: str, edit: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[f"{Q}.{name}"] = edit(tensors[f"{Q}.{name}"].copy())

    return damage


def drop(name: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[f"{Q}.{name}"]

    return damage


def put(values: NDArray[Any], place: int | tuple[int, int], value: float) -> NDArray[Any]:
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("scales"), rf"missing: {Q}\.scales \[2, 64\]"),
        (drop("qzeros"), rf"missing: {Q}\.qzeros \[2, 8\]"),
        (drop("qweight"), rf"missing: {Q}\.weight \[64, 64\]; unexpected: {Q}\.qzeros"),
        (change("qweight", lambda q: q[:-1]), rf"misshapen: {Q}\.qweight \[7, 64\], expected \[8, 64\]"),
        (change("scales", lambda s: s[:1]), rf"misshapen: {Q}\.scales \[1, 64\], expected \[2, 64\]"),
        (change("qzeros", lambda z: z.T), rf"misshapen: {Q}\.qzeros \[8, 2\], expected \[2, 8\]"),
        (change("g_idx", lambda g: g[:-1]), rf"misshapen: {Q}\.g_idx \[63\], expected \[64\]"),
        (change("qweight", lambda q: q.view(np.float32)), rf"type: {Q}\.qweight .* is F32, expected I32"),
        (
            change("scales", lambda s: np.zeros((2, 64), np.int32)),
            r"scales .* is I32, expected F32, F16",
        ),
        (
            change("g_idx", lambda g: put(g, 5, 2)),
            rf"model\.safetensors: tensor '{Q}\.g_idx': expected groups from 0 to 1, found 2 for column 5",
        ),
        (change("g_idx", lambda g: put(g, 5, -1)), r"g_idx': expected groups from 0 to 1, found -1 for col"),
        (change("scales", lambda s: put(s, (1, 2), np.inf)), rf"'{Q}\.scales' holds values that are not fin"),
        (change("scales", lambda s: put(s, (1, 2), np.nan)), rf"'{Q}\.scales' holds values that are not fin"),
        (
            change("scales", lambda s: put(s, (1, 2), 6e4)),
            rf"model\.safetensors: tensor '{Q}\.qweight': Q4_0 reaches to 65504, found",
        ),
    ],
)
def test_damaged_tensors(tmp_path: Path, damage: Callable[[Tensors], None], message: str) -> None:
    write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    tensors: Tensors = dict(load_file(tmp_path / "c" / "model.safetensors"))
    damage(tensors)
    write_safetensors(tmp_path / "c" / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=message) as raised:
        keep(tmp_path / "c", tmp_path / "m.gguf")
    assert str(tmp_path / "c") in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 3}, UnsupportedError, "bits: expected 4 or 8, found 3"),
        ({"bits": True}, UnsupportedError, "bits: expected 4 or 8, found True"),
        ({"bits": 1 << 70}, UnsupportedError, "bits: expected 4 or 8, found 1180591620717411303424"),
        ({"bits": 8}, FormatError, r"misshapen: .*\.qweight \[8, 64\], expected \[16, 64\]"),
        ({"group_size": 0}, FormatError, "group_size: expected -1 or from 1 to 1048576, found 0"),
        ({"group_size": 1 << 40}, FormatError, "group_size: expected -1 or from 1 to 1048576"),
        ({"group_size": "32"}, FormatError, "group_size: expected .* found '32'"),
        ({"group_size": 64}, FormatError, r"misshapen: .*q_proj\.qzeros \[2, 8\], expected \[1, 8\]"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "expected 'gptq' or 'gptq_v2', found 'marlin'"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, UnsupportedError, "dynamic: expected no settings of sing"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            UnsupportedError,
            "load_in_4bit: expected true",
        ),
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedError, "version: expected 'gemm', found 'ge"),
        ({"quant_method": "awq", "zero_point": False}, UnsupportedError, "zero_point: expected true, found"),
        (
            {"quant_method": "awq", "group_size": 48},
            FormatError,
            r"q_proj\.weight \[64, 64\] as AWQ 4 bit: columns: expected a multiple of 48, found 64",
        ),
        *(
            (
                {"quant_method": method},
                UnsupportedError,
                f"quant_method: expected 'gptq', 'awq' or .* {found}:",
            )
            for method, found in (
                ("fp8", "'fp8'"),
                ("compressed-tensors", "'compressed-tensors'"),
                ("hqq", "'hqq'"),
                ("eetq", "'eetq'"),
                ("auto-round", "'auto-round'"),
                (None, "None"),
                (7, "7"),
            )
        ),
    ],
)
def test_refused_settings(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    edit_json(tmp_path / "c" / "config.json", quantization_config=config["quantization_config"] | changes)
    with pytest.raises(error, match=message) as raised:
        keep(tmp_path / "c", tmp_path / "m.gguf")
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_sizes_that_words_do_not_divide(tmp_path: Path) -> None:
    odd = dataclasses.replace(SPEC, intermediate_size=100)
    write_checkpoint(tmp_path / "c", odd)
    tensors: Tensors = dict(load_file(tmp_path / "c" / "model.safetensors"))
    tensors["model.layers.0.mlp.down_proj.qweight"] = np.zeros((12, 64), np.int32)
    write_safetensors(tmp_path / "c" / "model.safetensors", tensors)
    edit_json(tmp_path / "c" / "config.json", quantization_config=PackSpec().config)
    with pytest.raises(
        FormatError, match=r"\[64, 100\] as GPTQ 4 bit: packed values: expected a multiple of 8"
    ):
        keep(tmp_path / "c", tmp_path / "m.gguf")


# --- bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["scales as floats", "double quantization"])
@pytest.mark.parametrize("columns", [160, 100], ids=["", "blocks that cross rows"])
def test_bitsandbytes(tmp_path: Path, nested: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl_q.convert.convert._CHUNK_VALUES", 1000)
    spec = dataclasses.replace(SPEC, intermediate_size=columns)
    values = write_bitsandbytes_checkpoint(tmp_path / "c", spec, nested)
    convert(tmp_path / "c", tmp_path / "m.gguf", "f32")
    for name, (kind, found) in written(tmp_path / "m.gguf", values).items():
        assert kind == "F32"
        np.testing.assert_array_equal(found, values[name], err_msg=name)
    report = keep(tmp_path / "c", tmp_path / "m.gguf")
    assert {kind for kind, _ in written(tmp_path / "m.gguf", values).values()} <= {"Q8_0", "F16"}
    assert "bitsandbytes 4 bit" in report.notes[0]
    assert (
        "matrix quantized anew to Q8_0 (no type has its table): relative error up to 0.00" in report.notes[0]
    )


def state_of(changes: dict[str, Any] | bytes) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        if isinstance(changes, bytes):
            text = changes
        else:
            text = json.dumps(json.loads(tensors[name].tobytes()) | changes).encode()
        tensors[name] = np.frombuffer(text, np.uint8)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("weight.quant_map"), rf"missing: {Q}\.weight\.quant_map \[16\]"),
        (drop("weight.nested_quant_map"), rf"missing: {Q}\.weight\.nested_quant_map \[256\]"),
        (drop("weight.quant_state.bitsandbytes__nf4"), "missing: .*quant_state.bitsandbytes__nf4"),
        (drop("weight.nested_absmax"), r"absmax \[64\] is U8, expected F32"),
        (drop("weight.absmax"), r"misshapen: .*q_proj\.weight \[2048, 1\], expected \[64, 64\]"),
        (change("weight", lambda w: w[:-1]), r"misshapen: .*weight \[2047, 1\], expected \[2048, 1\]"),
        (state_of({"shape": [64, 65]}), r"quant_state.*: shape: expected \[64, 64\], found \[64, 65\]"),
        (state_of({"blocksize": 0}), "blocksize: expected from 1 to 65536, found 0"),
        (state_of({"blocksize": 32}), r"misshapen: .*absmax \[64\], expected \[128\]"),
        (state_of({"nested_blocksize": 1 << 40}), "nested_blocksize: expected from 1 to 65536, found 109951"),
        (state_of({"nested_offset": None}), "nested_offset: expected a number, found None"),
        (state_of(b"["), "quant_state.*: not valid JSON"),
        (state_of(b"[" * 4000), "quant_state.*: not valid JSON"),
        (state_of(b"3"), "quant_state.*: expected a JSON object, found int"),
        (state_of(b" " * 5000), "quant_state.*: expected 1 to 4096 bytes, found .* "),
        (
            change("weight.quant_map", lambda t: put(t, 3, np.inf)),
            r"weight' holds values that are not finite",
        ),
    ],
)
def test_damaged_bitsandbytes(tmp_path: Path, damage: Callable[[Tensors], None], message: str) -> None:
    write_bitsandbytes_checkpoint(tmp_path / "c", SPEC, nested=True)
    tensors: Tensors = dict(load_file(tmp_path / "c" / "model.safetensors"))
    damage(tensors)
    write_safetensors(tmp_path / "c" / "model.safetensors", tensors)
    with pytest.raises(FormatError, match=message) as raised:
        keep(tmp_path / "c", tmp_path / "m.gguf")
    assert str(tmp_path / "c") in str(raised.value)


# --- the model ------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", ["Int4", "Int4 with zero points", "Int8", "AWQ", "act-order"])
def test_logits_are_those_of_the_dequantized_checkpoint(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch", reason="needs the parity extra")
    pytest.importorskip("transformers", reason="needs the parity extra")
    from conversations import conversation
    from qwen2vl_q import Qwen2VL
    from reference import Reference

    spec, packs, _ = KEPT.get(name, (SPEC, PackSpec(act_order=True), ""))
    matrices = write_packed_checkpoint(tmp_path / "c", spec, packs, seed=3)
    recipe = Recipe("f32", "f32", keep_packed=name != "act-order")
    convert_checkpoint(tmp_path / "c", tmp_path / "m.gguf", recipe)
    write_checkpoint(tmp_path / "d", spec, seed=3)
    tensors = unpacked_tensors(spec, matrices, seed=3)
    write_safetensors(tmp_path / "d" / "model.safetensors", tensors)
    c = conversation(4, [9, (90, 130), 7])
    with Qwen2VL.from_gguf(tmp_path / "m.gguf", precision="exact") as model:
        ours = model.logits(c.token_ids, c.images)
    expected = Reference(tmp_path / "d").logits(c.token_ids, c.images)
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-4
