"""Which type each tensor gets: llama.cpp's mixes, and what the user says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf import GGUFReader

from qwen2vl_q.checkpoint.tensor_map import Role
from qwen2vl_q.convert import FILE_TYPES, FileType, Override, Recipe
from qwen2vl_q.convert.recipe import FILE_TYPE_NUMBERS, TextShape, type_for_row

INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"
MADE_BY_LLAMA_CPP = (
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k_s",
    "q4_k_m",
    "q5_k_m",
    "q6_k",
    "f16",
    "bf16",
)
TIED = TextShape(n_layers=28, n_groups=6, is_tied=True)
UNTIED = TextShape(n_layers=28, n_groups=7, is_tied=False)
LARGEST = TextShape(n_layers=80, n_groups=8, is_tied=False)


def wanted(type: FileType, name: str, shape: TextShape = TIED) -> str:
    role = Role.EMBEDDING if name in ("output.weight", "token_embd.weight") else Role.LANGUAGE
    return Recipe(type).wanted(role, name, shape)


@pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")
@pytest.mark.parametrize("type", MADE_BY_LLAMA_CPP)
def test_types_are_llama_quantizes(type: FileType) -> None:
    name = type if type in ("f16", "bf16") else type.upper()
    reader = GGUFReader(INTEROP / f"interop-{name}.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPE_NUMBERS[type]
    stored = {t.name: t for t in reader.tensors}
    shape = TextShape.of({name: tuple(map(int, t.shape[::-1])) for name, t in stored.items()})
    assert shape == TextShape(2, 2, True)
    matrices = {name: t.tensor_type.name for name, t in stored.items() if len(t.shape) > 1}
    assert len(matrices) == 15
    assert {name: wanted(type, name, shape) for name in matrices} == matrices


def test_which_layers_have_more_bits() -> None:
    """Of 28, as files on the hub have them: an eighth at either end, and every third between."""
    more = [i for i in range(28) if wanted("q4_k_m", f"blk.{i}.ffn_down.weight") == "Q6_K"]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert [i for i in range(28) if wanted("q5_k_m", f"blk.{i}.attn_v.weight") == "Q6_K"] == more
    early = [i for i in range(28) if wanted("q4_k_s", f"blk.{i}.ffn_down.weight") == "Q5_K"]
    assert early == [0, 1, 2]
    assert [i for i in range(28) if wanted("q4_k_s", f"blk.{i}.attn_v.weight") == "Q5_K"] == [0, 1, 2, 3]
    assert wanted("q4_k_m", "blk.40.attn_v.weight", LARGEST) == "Q5_K"
    assert wanted("q5_k_s", "blk.0.ffn_down.weight") == "Q5_K"


def test_the_head_has_6_bits_and_embeddings_apart_from_it_do_not() -> None:
    for type in FILE_TYPES:
        base = re.sub("(_K)_[SML]$", r"\1", type.upper())
        head = base if base in ("F32", "F16", "BF16", "Q8_0") else "Q6_K"
        assert wanted(type, "token_embd.weight") == head
        assert wanted(type, "output.weight", UNTIED) == head
        assert wanted(type, "token_embd.weight", UNTIED) == base


def test_rows_that_blocks_do_not_divide() -> None:
    found = {
        type: [type_for_row(type, row) for row in (256, 96, 14)] for type in ("Q4_K", "Q5_K", "Q6_K", "Q4_1")
    }
    assert found == {
        "Q4_K": ["Q4_K", "Q5_0", "F16"],
        "Q5_K": ["Q5_K", "Q5_1", "F16"],
        "Q6_K": ["Q6_K", "Q8_0", "F16"],
        "Q4_1": ["Q4_1", "Q4_1", "F16"],
    }


def test_overrides() -> None:
    overrides = tuple(map(Override.of, (r"blk\.0\.=q8_0", "ffn_=q5_0", "v.blk=F16", r"x=y|attn_q=Q4_1")))
    recipe = Recipe("q4_k_s", overrides=overrides)
    expected = {
        "blk.0.ffn_up.weight": "Q8_0",  # the first that fits
        "blk.1.ffn_up.weight": "Q5_0",
        "blk.1.attn_k.weight": "Q4_K",
        "blk.1.attn_q.weight": "Q4_1",  # "=" within the expression
    }
    assert {name: recipe.wanted(Role.LANGUAGE, name, TIED) for name in expected} == expected
    assert recipe.wanted(Role.VISION, "v.blk.1.attn_q.weight", TIED) == "F16"
    assert recipe.wanted(Role.VECTOR, "blk.0.attn_q.bias", TIED) == "F32"  # norms and biases stay


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "expected REGEX=TYPE, found 'ffn_down'"),
        ("=q4_0", "expected REGEX=TYPE"),
        ("ffn=q9", "expected a type of F32, F16, BF16, Q4_0, .*Q6_K.*, found 'q9'"),
        ("ffn=q4_k_m", "expected a type of .*found 'q4_k_m'"),
        ("ffn(=q4_0", "not a regular expression: missing"),
    ],
)
def test_what_is_no_override(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Override.of(text)
