"""Adapters beside a model's weights: as if they had been merged, whatever types the weights have."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters import PREFIX, factors, write_adapter
from checkpoints import Array, CheckpointSpec, random_tensors, write_checkpoint
from command_line import Run
from conversations import N_TEXT_TOKENS
from gguf_files import rewritten, tower_of_2024
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.checkpoint.lora import Adapter
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint, split_model

TIED = CheckpointSpec(
    hidden_size=256,
    intermediate_size=320,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(8, 12, 12),
)
SPEC = dataclasses.replace(TIED, tie_word_embeddings=False)
RANK = 8
SCALE = 6 / 8  # lora_alpha over r
LANGUAGE = [
    f"model.layers.1.{name}"
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]
TOWER = [
    *(f"visual.blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    *("visual.patch_embed.proj", "visual.merger.mlp.0", "visual.merger.mlp.2"),
]
Q = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, files of it, and an adapter of every layer."""
    made = tmp_path_factory.mktemp("lora")
    for name, spec in (("untied", SPEC), ("tied", TIED)):
        source = write_checkpoint(made / name, spec, seed=3)
        for type in ("f32", "q8_0", "q4_0"):
            convert_checkpoint(source, made / f"{name}-{type}.gguf", Recipe(type))
    write_adapter(made / "all", all_layers(), r=RANK)
    write_adapter(made / "other", all_layers(seed=2), r=RANK)
    return made


def all_layers(seed: int = 1) -> Tensors:
    shapes = {name: values.shape for name, values in random_tensors(SPEC, 3).items()}
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module in (*LANGUAGE, *TOWER, "lm_head"):
        tensors |= factors(rng, module, shapes[f"{module}.weight"], RANK)
    return tensors | embedding_factors(rng)


def embedding_factors(rng: np.random.Generator) -> Tensors:
    module = f"{PREFIX}model.embed_tokens"
    return {
        f"{module}.lora_embedding_A": rng.standard_normal((RANK, 1040)).astype(np.float32) / 4,
        f"{module}.lora_embedding_B": rng.standard_normal((256, RANK)).astype(np.float32) / 4,
    }


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (56, 84, 3), np.uint8)


def logits(file: Path, precision: Any = "exact", **options: Any) -> Array:
    """Of a prompt with a picture, and of three tokens decoded behind it."""
    with Qwen2VL.from_gguf(file, n_threads=2, precision=precision, **options) as model:
        text = np.random.default_rng(8).integers(0, N_TEXT_TOKENS, 40).tolist()
        ids = text[:20]
        images = []
        if model.config.vision_config is not None:
            images = [model.load_image(picture())]
            ids += [model.config.image_token_id] * (math.prod(images[0].grid_thw) // 4)
        ids += text[20:]
        rows = [model.logits(ids, images)]
        state = _native.SequenceState(model._native, 256)
        state.prefill(_native.Prompt(model._native, text), [])
        for token in (5, 6, 7):
            state.accept(token)
            rows.append(state.logits[None])
        return np.concatenate(rows)


def nmse(found: Array, expected: Array) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


def test_it_is_as_if_merged(folder: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    adapters = [Adapter(folder / "all"), Adapter(folder / "other", -0.5)]
    convert_checkpoint(folder / "untied", merged, Recipe("f32"), adapters=adapters)
    expected = logits(merged)
    beside = {"lora": [folder / "all", (str(folder / "other"), -0.5)]}
    np.testing.assert_allclose(logits(folder / "untied-f32.gguf", **beside), expected, rtol=1e-4, atol=1e-4)
    assert nmse(logits(folder / "untied-f32.gguf"), expected) > 0.1  # what the adapters do
    # float32 weights, but factors in f16
    assert nmse(logits(folder / "untied-f32.gguf", "fast", **beside), logits(merged, "fast")) < 1e-6


def merged_weights(file: Path, tensors: Tensors, out: Path) -> Path:
    """The file's weights, dequantized, with the adapter `tensors` in numpy."""
    stored = _native.GgufFile(file)
    values: dict[str, Array] = {t.name: stored.read(t.name) for t in stored.tensors}

    def delta(module: str) -> Array:
        a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        product: Array = np.float32(SCALE) * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        return product.reshape(len(b), *a.shape[1:])

    for module, name in zip(
        LANGUAGE, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), strict=True
    ):
        values[f"blk.1.{name}.weight"] += delta(module)
    for module, name in zip(
        TOWER[1:], ("v.blk.0.attn_out", "v.blk.0.ffn_up", "v.blk.0.ffn_down"), strict=False
    ):
        values[f"{name}.weight"] += delta(module)
    for part, rows in zip("qkv", np.split(delta(TOWER[0]), 3), strict=True):
        values[f"v.blk.0.attn_{part}.weight"] += rows
    for frame, name in enumerate(("v.patch_embd.weight", "v.patch_embd.weight.1")):
        values[name] += delta(TOWER[4])[:, :, frame]
    for module, name in zip(TOWER[5:], ("mm.0", "mm.2"), strict=True):
        values[f"{name}.weight"] += delta(module)
    values["output.weight"] += delta("lm_head")
    a, b = (tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"] for part in "AB")
    looked_up: Array = np.float32(SCALE) * (b @ a).T
    values["token_embd.weight"] += looked_up
    return rewritten(file, out, keep=lambda name: name not in values, added=values)


@pytest.mark.parametrize("type", ["q8_0", "q4_0"])
def test_on_quantized_weights(folder: Path, tmp_path: Path, type: FileType) -> None:
    file = folder / f"untied-{type}.gguf"
    expected = logits(merged_weights(file, all_layers(), tmp_path / "m.gguf"))
    np.testing.assert_allclose(logits(file, lora=folder / "all"), expected, rtol=1e-4, atol=1e-4)
    # "fast" loses about what it loses without an adapter.
    lost = nmse(logits(file, "fast", lora=folder / "all"), expected)
    assert lost < 2 * nmse(logits(file, "fast"), logits(file))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_0"])
def test_scale_zero_changes_no_bit(folder: Path, type: str, precision: str) -> None:
    file = folder / f"untied-{type}.gguf"
    np.testing.assert_array_equal(
        logits(file, precision, lora=[(folder / "all", 0)]), logits(file, precision)
    )


def test_a_tied_head_has_updates_of_its_own(folder: Path, tmp_path: Path) -> None:
    """As PEFT computes: one is changed alone, or both with ensure_weight_tying."""
    rng = np.random.default_rng(4)
    embeddings, file = embedding_factors(rng), folder / "tied-f32.gguf"
    both = write_adapter(tmp_path / "both", embeddings, r=RANK, ensure_weight_tying=True)
    merged = tmp_path / "m.gguf"
    convert_checkpoint(folder / "tied", merged, Recipe("f32"), adapters=[Adapter(both)])
    np.testing.assert_allclose(logits(file, lora=both), logits(merged), rtol=1e-4, atol=1e-4)

    # An untied model whose head is the embeddings is the reference of the others.
    a, b = (embeddings[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"] for part in "AB")
    table = random_tensors(TIED, 3)["model.embed_tokens.weight"]
    delta: Array = np.float32(SCALE) * (b @ a).T
    changed = table + delta
    head = {f"{PREFIX}lm_head.lora_A.weight": b.T.copy(), f"{PREFIX}lm_head.lora_B.weight": a.T.copy()}
    for name, tensors, pair in (("e", embeddings, (changed, table)), ("h", head, (table, changed))):
        added = {"token_embd.weight": pair[0], "output.weight": pair[1]}
        untied = rewritten(file, tmp_path / f"{name}.gguf", keep=lambda n: n not in added, added=added)  # noqa: B023
        alone = write_adapter(tmp_path / name, tensors, r=RANK)
        np.testing.assert_allclose(logits(file, lora=alone), logits(untied), rtol=1e-4, atol=1e-4)


def test_without_the_tower_and_with_one_of_2024(folder: Path, tmp_path: Path) -> None:
    (text, _), (tower, _) = split_model(folder / "untied-f32.gguf", tmp_path / "m")
    adapter = folder / "all"
    whole = logits(folder / "untied-f32.gguf", lora=adapter)
    old = tower_of_2024(tower, tmp_path / "mmproj-old.gguf")
    np.testing.assert_array_equal(logits(text, mmproj=old, lora=adapter), whole)
    np.testing.assert_array_equal(logits(text, mmproj=False, lora=adapter)[-3:], whole[-3:])


def test_an_update_counts_as_work(folder: Path) -> None:
    def work(lora: Any) -> tuple[dict[str, float], int]:
        native = Qwen2VL.from_gguf(folder / "untied-q4_0.gguf", lora=lora)._native
        state = _native.SequenceState(native, 64)
        state.prefill(_native.Prompt(native, [1, 2]), [])
        native.start_profile()
        state.accept(3)
        return {s["name"]: s["float_ops"] for s in native.stop_profile()}, native.weight_bytes

    (plain, plain_bytes), (beside, bytes) = work([]), work(folder / "all")
    assert beside["text down_proj"] - plain["text down_proj"] == 2 * RANK * (256 + 320)
    assert bytes > plain_bytes


def test_the_demo_still_answers(tmp_path: Path) -> None:
    config = _native.read_config(str(DEMO_MODEL))["text_config"]
    width = config["hidden_size"]
    rng = np.random.default_rng(0)
    tensors: Tensors = {}
    for layer in range(config["num_hidden_layers"]):
        tensors |= factors(rng, f"model.layers.{layer}.self_attn.o_proj", (width, width), 4)
    adapter = write_adapter(tmp_path / "a", tensors)
    question = [{"role": "user", "content": "What is in the picture?"}]

    def answer(**options: Any) -> str:
        return "".join(Qwen2VL.from_gguf(DEMO_MODEL, **options).chat(question, max_new_tokens=12))

    assert answer(lora=[(adapter, 0.01)]) == answer()
    assert answer(lora=[(adapter, 10)]) != answer()


def test_the_commands(folder: Path, run: Run) -> None:
    file, adapter = folder / "untied-f32.gguf", folder / "all"

    def answer(*options: object) -> str:
        code, out, _ = run("chat", "-m", file, "-p", "Hi", "--max-new-tokens", 4, *options)
        assert code == 0
        return out

    plain, whole = answer(), answer("--lora", adapter)
    assert plain != whole
    assert answer("--lora", f"{adapter}:0") == plain
    assert answer("--lora", f"{adapter}:0.25", "--lora", f"{adapter}:0.75") == whole
    code, _, errors = run("chat", "-m", file, "-p", "Hi", "--lora", f"{adapter}:x")
    assert code == 2
    assert "expected a number after the colon" in errors
    decode = ["--only", "decode", "--decode-tokens", 1, "--repeat", 1, "--profile", "--json"]
    code, out, _ = run("bench", "-m", file, *decode, "--lora", f"{adapter}:2")
    [found] = json.loads(out)
    assert found["lora"] == [{"folder": str(adapter), "scale": 2}]
    [stage] = [s for s in found["decode"][0]["stages"] if s["name"] == "text o_proj"]
    assert stage["float_ops"] == 2 * (2 * 256 * 256 + 2 * RANK * 256)


def put(name: str, values: NDArray[Any]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({PREFIX + name: values})


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("damage", "config", "error", "message"),
    [
        (put(f"{Q}.lora_A.weight", zeros(8, 65)), {}, FormatError, r"expected \[8, 256\], found \[8, 65\]"),
        (put(f"{Q}.lora_B.weight", zeros(256, 9)), {}, FormatError, r"expected \[256, 8\], found \[256, 9\]"),
        (put(f"{Q}.lora_B.weight", zeros(256, 8) + np.nan), {}, FormatError, r"q_proj.lora_B.* not finite"),
        (put(f"{Q}.lora_A.weight", zeros(8, 256).astype(np.int32)), {}, FormatError, "expected F32, .* I32"),
        (
            put(f"{Q}.lora_B.weight", zeros(256, 8) + 3e38),
            {},
            FormatError,
            r"q_proj\.lora_B\.weight': too large for its scale",
        ),
        (
            lambda tensors: tensors.update(factors(np.random.default_rng(0), "lm_heads", (9, 256), 8)),
            {},
            FormatError,
            r"lm_heads\.lora_B\.weight': the base has no matrix lm_heads\.weight",
        ),
        (
            put(f"{Q}.lora_magnitude_vector", zeros(256)),
            {},
            UnsupportedError,
            r"q_proj\.lora_magnitude_vector': expected lora_A or _B, found a magnitude .*convert --lora",
        ),
        (
            put(f"{Q}.base_layer.bias", zeros(256)),
            {},
            UnsupportedError,
            r"bias': expected lora_A or _B, found a whole tensor, .*convert --lora",
        ),
        (put("lm_head.weight", zeros(1040, 256)), {}, UnsupportedError, "found a whole tensor"),
        (
            lambda tensors: tensors.update(factors(np.random.default_rng(0), Q, (256, 256), 1025)),
            {"r": 1025},
            UnsupportedError,
            r"q_proj\.lora_B\.weight': expected a rank of at most 1024, .* found 1025, .*convert --lora",
        ),
        (
            put("x" * 3000, zeros(1)),
            {},
            FormatError,
            r"tensor 'base_model.model.x+\.\.\. \(3017 in all\)': exp",
        ),
        (lambda tensors: None, {"lora_alpha": "x"}, FormatError, "lora_alpha: expected a number, found 'x'"),
    ],
)
def test_hostile_adapters(
    folder: Path,
    tmp_path: Path,
    damage: Callable[[Tensors], None],
    config: Mapping[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    tensors: Tensors = {**factors(np.random.default_rng(0), Q, (256, 256), RANK)}
    damage(tensors)
    adapter = write_adapter(tmp_path / "a", tensors, **{"r": RANK, "lora_alpha": 60, **config})
    with pytest.raises(error, match=message) as raised:
        Qwen2VL.from_gguf(folder / "untied-f32.gguf", lora=adapter)
    assert str(adapter) in str(raised.value)


def test_ranks_add_up(folder: Path, tmp_path: Path) -> None:
    tensors: Tensors = {**factors(np.random.default_rng(0), Q, (256, 256), 600)}
    adapter = write_adapter(tmp_path / "a", tensors, r=600)
    with pytest.raises(UnsupportedError, match="all adapters together, found 1200"):
        Qwen2VL.from_gguf(folder / "untied-f32.gguf", lora=[adapter, adapter])


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", True])
def test_scales_that_are_none(folder: Path, scale: Any) -> None:
    with pytest.raises(ValueError, match="lora: expected a finite number as a scale, found"):
        Qwen2VL.from_gguf(folder / "untied-f32.gguf", lora=[(folder / "all", scale)])


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (("blk.9.attn_q.weight", zeros(4, 256), zeros(256, 4)), r"blk\.9\.attn_q\.weight: .* no such matrix"),
        (("blk.0.attn_q.weight", zeros(4, 255), zeros(256, 4)), r"blk\.0\.attn_q\.weight: expected factors"),
        (
            ("blk.0.attn_q.weight", zeros(4, 256), zeros(256, 5)),
            r"expected shape \(256, 4\), found \(256, 5\)",
        ),
        (("blk.0.attn_q.weight", zeros(4), zeros(256, 4)), r"blk\.0\.attn_q\.weight: expected shape"),
        (("blk.0.attn_q.weight", zeros(0, 256), zeros(256, 0)), "expected a rank from 1 to 1024, found 0"),
    ],
)
def test_native_updates_are_checked(folder: Path, update: tuple[str, Array, Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.Model(folder / "untied-f32.gguf", updates=[update])


def test_native_updates_are_given_once(folder: Path) -> None:
    update = ("blk.0.attn_q.weight", zeros(4, 256), zeros(256, 4))
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight: given twice"):
        _native.Model(folder / "untied-f32.gguf", updates=[update, update])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "modules", "settings"),
    [
        ("untied", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"], {}),
        ("untied", "all-linear", {"use_rslora": True, "rank_pattern": {"down_proj": 2}}),
        ("tied", ["q_proj", "lm_head"], {}),
        ("tied", ["embed_tokens"], {}),
    ],
)
def test_peft_computes_the_same(
    folder: Path, tmp_path: Path, name: str, modules: Any, settings: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / name, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, **settings))
    torch.manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    ids = np.random.default_rng(8).integers(0, N_TEXT_TOKENS, 30).tolist()
    with torch.inference_mode():
        expected = tuned.eval()(torch.tensor([ids])).logits[0].numpy()
    found = Qwen2VL.from_gguf(folder / f"{name}-f32.gguf", precision="exact", lora=tmp_path / "a").logits(ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert nmse(Qwen2VL.from_gguf(folder / f"{name}-f32.gguf").logits(ids), expected) > 1e-3
