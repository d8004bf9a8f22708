"""convert --lora: what PEFT's adapters become in the merged file."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from numpy.typing import NDArray

from adapters import PREFIX, factors, write_adapter
from checkpoints import Array, CheckpointSpec, random_tensors, write_checkpoint
from packers import PackSpec, write_packed_checkpoint
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.cli.convert import convert as command
from qwen2vl_q.convert import Adapter, Recipe, Report, convert_checkpoint, default_recipe

SPEC = CheckpointSpec(tie_word_embeddings=False)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
QKV, PATCH = "visual.blocks.1.attn.qkv", "visual.patch_embed.proj"
Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), SPEC)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def merge(base: Path, out: Path, *adapters: Adapter, recipe: Recipe | None = None) -> dict[str, Array]:
    """The file's float32 tensors by their names."""
    report(base, out, *adapters, recipe=recipe)
    return {t.name: t.data.reshape(t.shape[::-1]) for t in GGUFReader(out).tensors}


def report(base: Path, out: Path, *adapters: Adapter, recipe: Recipe | None = None) -> Report:
    return convert_checkpoint(base, out, recipe or Recipe("f32"), overwrite=True, adapters=adapters)


def delta(tensors: Tensors, module: str) -> Array:
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
    product: Array = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return product.reshape(len(b), *a.shape[1:])


def assert_close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_updates_reach_both_towers(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    weights = random_tensors(SPEC, 0)
    tensors: Tensors = {}
    for module in (Q, DOWN, QKV, PATCH, "lm_head"):
        tensors |= factors(rng, module, weights[f"{module}.weight"].shape, 4)
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    assert set(adapter.targets) == {f"{m}.weight" for m in (Q, DOWN, QKV, PATCH, "lm_head")}
    found = merge(base, tmp_path / "m.gguf", adapter)

    def merged(module: str) -> Array:
        return weights[f"{module}.weight"] + np.float32(1.5) * delta(tensors, module)

    assert_close(found["blk.0.attn_q.weight"], merged(Q))
    assert_close(found["blk.1.ffn_down.weight"], merged(DOWN))
    assert_close(found["output.weight"], merged("lm_head"))
    for part, name in enumerate("qkv"):
        assert_close(found[f"v.blk.1.attn_{name}.weight"], merged(QKV)[part * 64 : (part + 1) * 64])
    assert_close(found["v.patch_embd.weight"], merged(PATCH)[:, :, 0])
    assert_close(found["v.patch_embd.weight.1"], merged(PATCH)[:, :, 1])
    np.testing.assert_array_equal(
        found["blk.1.attn_q.weight"], weights["model.layers.1.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj",
        "model.language_model.layers.0.self_attn.q_proj",
        "language_model.layers.0.self_attn.q_proj",
    ],
)
def test_names_of_older_and_newer_bases(
    base: Path, tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    adapter = Adapter(write_adapter(tmp_path / "a", factors(rng, name, (64, 64), 4)))
    assert adapter.targets == [f"{Q}.weight"]
    merge(base, tmp_path / "m.gguf", adapter)


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 6 / 4),
        ({"use_rslora": True}, 4, 6 / 2),
        ({"lora_alpha": 0.5}, 4, 0.5 / 4),
        ({"rank_pattern": {"q_proj": 8}}, 8, 6 / 8),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 2}}, 8, 2 / 8),
        ({"rank_pattern": {"^model.layers.0.self_attn.q_proj$": 8}}, 8, 6 / 8),
        ({"rank_pattern": {"^self_attn.q_proj": 8, "_proj": 8, "roj": 8}}, 4, 6 / 4),
        ({"alpha_pattern": {r"self_attn\.q_proj": 9, "q_proj": 2}}, 4, 9 / 4),
    ],
)
def test_scales(
    base: Path, tmp_path: Path, rng: np.random.Generator, config: dict[str, Any], rank: int, scale: float
) -> None:
    tensors: Tensors = {**factors(rng, Q, (64, 64), rank)}
    folder = write_adapter(tmp_path / "a", tensors, **config)
    [update] = Adapter(folder, -2).updates()
    assert update.scale == pytest.approx(-2 * scale)
    found = merge(base, tmp_path / "m.gguf", Adapter(folder))["blk.0.attn_q.weight"]
    assert_close(found, random_tensors(SPEC, 0)[f"{Q}.weight"] + np.float32(scale) * delta(tensors, Q))


def test_embeddings(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal((4, 1040)), rng.standard_normal((64, 4))
    module = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{module}.lora_embedding_A": a.astype(np.float32),
        f"{module}.lora_embedding_B": b.astype(np.float32),
    }
    folder = write_adapter(tmp_path / "a", tensors)
    found = merge(base, tmp_path / "m.gguf", Adapter(folder))["token_embd.weight"]
    expected = random_tensors(SPEC, 0)["model.embed_tokens.weight"] + (1.5 * (b @ a).T).astype(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    tied = write_checkpoint(tmp_path / "tied", dataclasses.replace(SPEC, tie_word_embeddings=True))
    with pytest.raises(UnsupportedError, match="ties its head to the embeddings, the adapter changes one"):
        merge(tied, tmp_path / "m.gguf", Adapter(folder))
    both = Adapter(write_adapter(tmp_path / "b", tensors, ensure_weight_tying=True))
    head_too = merge(tied, tmp_path / "m.gguf", both)["token_embd.weight"]
    np.testing.assert_allclose(head_too, expected, rtol=1e-5, atol=1e-5)


def test_whole_tensors(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """modules_to_save and bias="all"."""
    head = rng.standard_normal((1040, 64)).astype(np.float32)
    bias = rng.standard_normal(64).astype(np.float32)
    tensors: Tensors = {
        **factors(rng, Q, (64, 64), 4),
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}{Q}.base_layer.bias": bias,
    }
    folder = write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"], bias="all")
    found = merge(base, tmp_path / "m.gguf", Adapter(folder))
    np.testing.assert_array_equal(found["output.weight"], head)
    np.testing.assert_array_equal(found["blk.0.attn_q.bias"], bias)
    notes = report(base, tmp_path / "m.gguf", Adapter(folder)).notes
    assert "a: merged into 1 matrices, rank 4, 2 tensors replaced" in notes
    with pytest.raises(UnsupportedError, match=r"a scale of 0\.5 is for updates alone"):
        Adapter(folder, 0.5)
    with pytest.raises(FormatError, match="both replace"):
        merge(base, tmp_path / "m.gguf", Adapter(folder), Adapter(folder))
    tied = write_checkpoint(tmp_path / "tied", dataclasses.replace(SPEC, tie_word_embeddings=True))
    with pytest.raises(UnsupportedError, match="ties its head"):
        merge(tied, tmp_path / "m.gguf", Adapter(folder))
    same = {f"{PREFIX}{name}.weight": head for name in ("lm_head", "model.embed_tokens")}
    found = merge(tied, tmp_path / "m.gguf", Adapter(write_adapter(tmp_path / "b", same)))
    np.testing.assert_array_equal(found["token_embd.weight"], head)


def test_several_adapters_add_up(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    first: Tensors = {**factors(rng, Q, (64, 64), 4)}
    second: Tensors = {**factors(rng, Q, (64, 64), 2)}
    found = merge(
        base,
        tmp_path / "m.gguf",
        Adapter(write_adapter(tmp_path / "a", first)),
        Adapter(write_adapter(tmp_path / "b", second, r=2, lora_alpha=2), 0.5),
    )
    expected = random_tensors(SPEC, 0)[f"{Q}.weight"] + 1.5 * delta(first, Q) + 0.5 * delta(second, Q)
    assert_close(found["blk.0.attn_q.weight"], expected)


def test_dora(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    magnitude = rng.uniform(1, 2, 64).astype(np.float32)
    tensors: Tensors = {**factors(rng, Q, (64, 64), 4), f"{PREFIX}{Q}.lora_magnitude_vector": magnitude}
    folder = write_adapter(tmp_path / "a", tensors, use_dora=True)
    found = merge(base, tmp_path / "m.gguf", Adapter(folder))["blk.0.attn_q.weight"]
    updated = random_tensors(SPEC, 0)[f"{Q}.weight"] + 1.5 * delta(tensors, Q)
    assert_close(found, magnitude[:, None] * updated / np.linalg.norm(updated, axis=1, keepdims=True))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), magnitude, rtol=1e-5)


def test_a_packed_base(tmp_path: Path, rng: np.random.Generator) -> None:
    """What is updated is quantized anew, the rest kept."""
    matrices = write_packed_checkpoint(tmp_path / "c", SPEC, PackSpec())
    tensors: Tensors = {**factors(rng, Q, (64, 64), 4)}
    adapter = Adapter(write_adapter(tmp_path / "a", tensors))
    found = merge(tmp_path / "c", tmp_path / "m.gguf", adapter)["blk.0.attn_q.weight"]
    assert_close(found, matrices[f"{Q}.weight"].weights + 1.5 * delta(tensors, Q))
    result = report(tmp_path / "c", tmp_path / "m.gguf", adapter, recipe=default_recipe(tmp_path / "c"))
    types = {t.output.name: t.output.type for t in result.tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.1.attn_q.weight"]) == ("Q8_0", "Q4_0")
    assert any(
        "GPTQ 4 bit and LoRA: 1 of language model matrix quantized anew to Q8_0" in n for n in result.notes
    )
    assert "GPTQ 4 bit: 13 of language model matrix kept as Q4_0: nothing lost" in result.notes


def drop(name: str) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        del tensors[f"{PREFIX}{Q}.{name}"]

    return damage


def put(name: str, values: NDArray[Any]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[PREFIX + name] = values

    return damage


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("lora_A.weight"), r"q_proj\.lora_B\.weight': expected lora_A beside it, found none"),
        (drop("lora_B.weight"), r"q_proj\.lora_A\.weight': expected lora_B beside it, found none"),
        (put(f"{Q}.lora_A.weight", zeros(4, 65)), r"expected \[4, 64\], found \[4, 65\]"),
        (put(f"{Q}.lora_B.weight", zeros(63, 4)), r"expected \[64, 4\], found \[63, 4\]"),
        (put(f"{Q}.lora_A.weight", zeros(3, 64)), r"expected \[4, 64\], found \[3, 64\]"),
        (put(f"{Q}.lora_A.weight", zeros()), r"expected \[4, 64\], found \[\]"),
        (put(f"{Q}.lora_A.weight", zeros(4, 64) + np.nan), "not finite"),
        (put(f"{Q}.lora_A.weight", np.zeros((4, 64), np.int32)), "expected F32, F16, BF16, found I32"),
        (put(f"{Q}.lora_C.weight", zeros(4, 64)), "expected lora_A, lora_B or a whole"),
        (put(f"{Q}.lora_B.bias", zeros(64)), "expected lora_A, lora_B or a whole"),
        (put("model.norm.bias", zeros(64)), "expected no such tensor in the base"),
        (put("lm_head.weight", zeros(1041, 64)), r"expected \[1040, 64\], found \[1041, 64\]"),
        (
            lambda tensors: tensors.update(
                factors(np.random.default_rng(0), "model.layers.9.q", (64, 64), 4)
            ),
            r"layers\.9\.q\.lora_B\.weight': the base has no matrix model\.layers\.9\.q\.weight",
        ),
        (lambda tensors: tensors.clear(), "the adapter is empty"),
    ],
)
def test_damaged_adapters(
    base: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    damage: Callable[[Tensors], None],
    message: str,
) -> None:
    tensors: Tensors = {**factors(rng, Q, (64, 64), 4)}
    damage(tensors)
    folder = write_adapter(tmp_path / "a", tensors)
    with pytest.raises(FormatError, match=message) as raised:
        merge(base, tmp_path / "m.gguf", Adapter(folder))
    assert str(folder) in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "peft_type: only 'LORA' is supported, found 'IA3'"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights: only True .* found 'pissa'"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias: only False is supported, found True"),
        ({"fan_in_fan_out": True}, UnsupportedError, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
        (
            {"rank_pattern": {"(a+)+$": 4}},
            UnsupportedError,
            "rank_pattern: only modules' names are supported",
        ),
        ({"rank_pattern": 4}, FormatError, "rank_pattern: expected an object, found 4"),
        ({"r": 0}, FormatError, "r: expected from 1 to 16384, found 0"),
        ({"r": True}, FormatError, "r: expected from 1 to 16384, found True"),
        ({"lora_alpha": "x"}, FormatError, "lora_alpha: expected a number, found 'x'"),
        ({"lora_alpha": math.inf}, FormatError, "lora_alpha: expected a number, found inf"),
        ({"use_rslora": 1}, FormatError, "use_rslora: expected true or false, found 1"),
    ],
)
def test_refused_settings(
    base: Path,
    tmp_path: Path,
    rng: np.random.Generator,
    config: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = write_adapter(tmp_path / "a", {**factors(rng, Q, (64, 64), 4)}, **config)
    with pytest.raises(error, match=message) as raised:
        merge(base, tmp_path / "m.gguf", Adapter(folder))
    assert "adapter_config.json" in str(raised.value)


def test_folders_that_are_no_adapters(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(FormatError, match=r"no adapter_config\.json, so this is not a PEFT adapter"):
        Adapter(base)
    folder = write_adapter(tmp_path / "a", {**factors(rng, Q, (64, 64), 4)})
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FormatError, match=r"no adapter_model\.safetensors"):
        Adapter(folder)


def test_the_command(base: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    tensors: Tensors = {**factors(rng, Q, (64, 64), 4)}
    folder = write_adapter(tmp_path / "a", tensors)
    out = tmp_path / "m.gguf"

    def run(*options: str) -> Any:
        arguments = [str(base), str(out), "--type", "f32", "--force", *options]
        return CliRunner().invoke(command, arguments)

    result = run("--lora", f"{folder}:0.5", "--lora", str(folder))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("note: a: merged into 1 matrices, rank 4\n") == 2
    found = {t.name: t.data for t in GGUFReader(out).tensors}["blk.0.attn_q.weight"]
    assert_close(found, random_tensors(SPEC, 0)[f"{Q}.weight"] + (0.75 + 1.5) * delta(tensors, Q))
    assert "is not a folder" in run("--lora", str(tmp_path / "none")).stderr
    assert "expected a number after the colon" in run("--lora", f"{folder}:x").stderr
    assert "expected a number after the colon" in run("--lora", f"{folder}:nan").stderr


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_peft_merges_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="needs the parity extra")
    peft = pytest.importorskip("peft", reason="needs peft")
    from transformers import Qwen2VLForConditionalGeneration

    source = write_checkpoint(tmp_path / "c", SPEC)
    model = Qwen2VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj", "qkv", "embed_tokens"][: 3 if "use_dora" in settings else 4],
        modules_to_save=["lm_head"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        **settings,
    )
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            noise = 0.05 * torch.randn_like(parameter)
            parameter.data = parameter.data.abs() + noise.abs() if "magnitude" in name else parameter + noise
    tuned.save_pretrained(tmp_path / "a")
    found = merge(source, tmp_path / "m.gguf", Adapter(tmp_path / "a"))
    theirs = {n: p.detach().numpy() for n, p in tuned.merge_and_unload().state_dict().items()}
    for ours, name in (
        ("blk.0.attn_q.weight", "model.language_model.layers.0.self_attn.q_proj.weight"),
        ("blk.1.attn_q.weight", "model.language_model.layers.1.self_attn.q_proj.weight"),
        ("blk.1.attn_q.bias", "model.language_model.layers.1.self_attn.q_proj.bias"),
        ("blk.1.ffn_down.weight", "model.language_model.layers.1.mlp.down_proj.weight"),
        ("token_embd.weight", "model.language_model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_allclose(found[ours], theirs[name], rtol=1e-5, atol=1e-6, err_msg=ours)
    np.testing.assert_allclose(
        found["v.blk.0.attn_k.weight"],
        theirs["model.visual.blocks.0.attn.qkv.weight"][64:128],
        rtol=1e-5,
        atol=1e-6,
    )
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["peft_type"] == "LORA"
