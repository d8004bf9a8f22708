"""The one table from a checkpoint's tensors to the file's: names, shapes, roles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from qwen2vl_q.checkpoint.shapes import MAX_SIZE, ModelShape, VisionConfig


class Role(Enum):
    """What a tensor is, as far as its storage type goes."""

    VECTOR = "norm or bias"
    EMBEDDING = "embedding or head"
    LANGUAGE = "language model matrix"
    VISION = "vision tower matrix"
    PATCH = "patch embedding"
    HEAD = "projection or score head"


@dataclass(frozen=True)
class MappedTensor:
    """A checkpoint's tensor and what becomes of it: several targets are equal parts along `split_axis`."""

    source: str
    source_shape: tuple[int, ...]
    targets: tuple[str, ...]
    role: Role

    @property
    def split_axis(self) -> int:
        return 2 if self.role is Role.PATCH else 0  # patch embedding: [dim, channels, frames, rows, columns]

    @property
    def target_shape(self) -> tuple[int, ...]:
        shape = self.source_shape
        if self.role is Role.PATCH:
            return (*shape[:2], *shape[3:])
        return (shape[0] // len(self.targets), *shape[1:])


class _Rule(NamedTuple):
    """A module's names in the checkpoint (the hub's style, see tensors.canonical_name) and in the file.

    {} stands for the block's number. `shape` is the weight's, in the names of _sizes(); a bias has its first.
    """

    source: str
    targets: tuple[str, ...]
    shape: tuple[str, ...]
    role: Role
    parts: tuple[str, ...]


_W = ("weight",)
_WB = ("weight", "bias")
_VECTOR, _EMBEDDING, _LANGUAGE, _VISION = Role.VECTOR, Role.EMBEDDING, Role.LANGUAGE, Role.VISION

_EMBED_TOKENS = _Rule("model.embed_tokens", ("token_embd",), ("vocab", "hidden"), _EMBEDDING, _W)
_LAYER = (
    _Rule("model.layers.{}.input_layernorm", ("blk.{}.attn_norm",), ("hidden",), _VECTOR, _W),
    _Rule("model.layers.{}.self_attn.q_proj", ("blk.{}.attn_q",), ("hidden", "hidden"), _LANGUAGE, _WB),
    _Rule("model.layers.{}.self_attn.k_proj", ("blk.{}.attn_k",), ("kv", "hidden"), _LANGUAGE, _WB),
    _Rule("model.layers.{}.self_attn.v_proj", ("blk.{}.attn_v",), ("kv", "hidden"), _LANGUAGE, _WB),
    _Rule("model.layers.{}.self_attn.o_proj", ("blk.{}.attn_output",), ("hidden", "hidden"), _LANGUAGE, _W),
    _Rule("model.layers.{}.post_attention_layernorm", ("blk.{}.ffn_norm",), ("hidden",), _VECTOR, _W),
    _Rule("model.layers.{}.mlp.gate_proj", ("blk.{}.ffn_gate",), ("ffn", "hidden"), _LANGUAGE, _W),
    _Rule("model.layers.{}.mlp.up_proj", ("blk.{}.ffn_up",), ("ffn", "hidden"), _LANGUAGE, _W),
    _Rule("model.layers.{}.mlp.down_proj", ("blk.{}.ffn_down",), ("hidden", "ffn"), _LANGUAGE, _W),
)
_NORM = _Rule("model.norm", ("output_norm",), ("hidden",), _VECTOR, _W)
_HEAD = _Rule("lm_head", ("output",), ("vocab", "hidden"), _EMBEDDING, _W)
_VISION_BLOCK = (
    _Rule("visual.blocks.{}.norm1", ("v.blk.{}.ln1",), ("v_dim",), _VECTOR, _WB),
    _Rule(
        "visual.blocks.{}.attn.qkv",
        ("v.blk.{}.attn_q", "v.blk.{}.attn_k", "v.blk.{}.attn_v"),
        ("v_qkv", "v_dim"),
        _VISION,
        _WB,
    ),
    _Rule("visual.blocks.{}.attn.proj", ("v.blk.{}.attn_out",), ("v_dim", "v_dim"), _VISION, _WB),
    _Rule("visual.blocks.{}.norm2", ("v.blk.{}.ln2",), ("v_dim",), _VECTOR, _WB),
    _Rule("visual.blocks.{}.mlp.fc1", ("v.blk.{}.ffn_up",), ("v_ffn", "v_dim"), _VISION, _WB),
    _Rule("visual.blocks.{}.mlp.fc2", ("v.blk.{}.ffn_down",), ("v_dim", "v_ffn"), _VISION, _WB),
)
_MERGER = (
    _Rule("visual.merger.ln_q", ("v.post_ln",), ("v_dim",), _VECTOR, _WB),
    _Rule("visual.merger.mlp.0", ("mm.0",), ("v_merged", "v_merged"), _VISION, _WB),
    _Rule("visual.merger.mlp.2", ("mm.2",), ("hidden", "v_merged"), _VISION, _WB),
)


_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
_ROLES = dict.fromkeys(_PATCHES, Role.PATCH) | {
    f"{target}.{part}": rule.role if part == "weight" else Role.VECTOR
    for rule in (_EMBED_TOKENS, *_LAYER, _NORM, _HEAD, *_VISION_BLOCK, *_MERGER)
    for target in rule.targets
    for part in rule.parts
}


def map_tensors(config: ModelShape) -> list[MappedTensor]:
    """Every tensor that a checkpoint of this shape has, in the order of the file."""
    sizes = _sizes(config)

    def apply(rule: _Rule, block: int = 0) -> list[MappedTensor]:
        shape = tuple(sizes[name] for name in rule.shape)
        return [
            MappedTensor(
                f"{rule.source.format(block)}.{part}",
                shape if part == "weight" else shape[:1],
                tuple(f"{target.format(block)}.{part}" for target in rule.targets),
                rule.role if part == "weight" else Role.VECTOR,
            )
            for part in rule.parts
        ]

    mapped = apply(_EMBED_TOKENS)
    for layer in range(config.text.num_hidden_layers):
        mapped += [tensor for rule in _LAYER for tensor in apply(rule, layer)]
    mapped += apply(_NORM)
    if not config.tie_word_embeddings:
        mapped += apply(_HEAD)
    if config.vision is None:
        return mapped
    mapped.append(_patch_embedding(config.vision))
    for block in range(config.vision.depth):
        mapped += [tensor for rule in _VISION_BLOCK for tensor in apply(rule, block)]
    return mapped + [tensor for rule in _MERGER for tensor in apply(rule)]


def role_of(name: str) -> Role | None:
    """Of a tensor by its name in the file, a fine-tune's heads too; None for one that nothing reads."""
    if head := re.fullmatch(r"head\.[A-Za-z0-9_]{1,40}\.(weight|bias)", name):
        return Role.HEAD if head[1] == "weight" else Role.VECTOR
    return _ROLES.get(re.sub(r"^((?:v\.)?blk\.)\d+(?=\.)", r"\1{}", name))


def name_in_model(name: str, swapped: bool) -> str:
    """Of a tensor that a file calls `name`; `swapped` as of `_native.has_swapped_feed_forward`."""
    if not swapped or not name.startswith("v.blk."):
        return name
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return ".".join(other.get(part, part) for part in name.split("."))


def map_heads(config: ModelShape, shapes: Mapping[str, tuple[int, ...]]) -> list[MappedTensor]:
    """Linear maps of the hidden states that a fine-tune has beside the model (custom_text_proj, score, ...):
    modules of the top level with a weight [any, hidden] and perhaps a bias. In the file NAME is head.NAME."""
    mapped = []
    for name, parts in _modules_beside(shapes).items():
        weight = shapes.get(f"{name}.weight", ())
        fits = len(weight) == 2 and weight[1] == config.text.hidden_size and 0 < weight[0] <= MAX_SIZE
        plain = re.fullmatch(r"[A-Za-z0-9_]{1,40}", name) and parts <= {"weight", "bias"}
        if fits and plain:
            mapped.append(MappedTensor(f"{name}.weight", weight, (f"head.{name}.weight",), Role.HEAD))
            if "bias" in parts:
                mapped.append(MappedTensor(f"{name}.bias", weight[:1], (f"head.{name}.bias",), Role.VECTOR))
    return mapped


def other_modules(
    shapes: Mapping[str, tuple[int, ...]], heads: Sequence[MappedTensor]
) -> dict[str, list[str]]:
    """Of what stands beside the model what is none of `heads`: modules with the names of their tensors."""
    known = {head.source.rpartition(".")[0] for head in heads}
    return {
        name: [f"{name}.{part}" for part in sorted(parts)]
        for name, parts in _modules_beside(shapes).items()
        if name not in known
    }


def _modules_beside(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, set[str]]:
    """Modules of the top level that Qwen2-VL does not have, with what they hold."""
    modules: dict[str, set[str]] = {}
    for tensor in shapes:
        name, dot, part = tensor.partition(".")
        if dot and name not in ("model", "visual", "lm_head"):
            modules.setdefault(name, set()).add(part)
    return modules


def _patch_embedding(c: VisionConfig) -> MappedTensor:
    """A convolution over two frames; the file has a slice for each."""
    return MappedTensor(
        "visual.patch_embed.proj.weight",
        (c.embed_dim, c.in_channels, c.temporal_patch_size, c.patch_size, c.patch_size),
        _PATCHES,
        Role.PATCH,
    )


def _sizes(config: ModelShape) -> dict[str, int]:
    text, vision = config.text, config.vision
    sizes = {
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "kv": text.num_key_value_heads * text.head_dim,
        "ffn": text.intermediate_size,
    }
    if vision is None:
        return sizes
    return sizes | {
        "v_dim": vision.embed_dim,
        "v_qkv": 3 * vision.embed_dim,
        "v_ffn": vision.intermediate_size,
        "v_merged": vision.embed_dim * vision.spatial_merge_size**2,
    }
