"""Small Qwen2-VL checkpoints with random weights, as a Hugging Face repository has them (no torch needed)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TOKENIZER = Path(__file__).parent / "data" / "tokenizer"
N_TOKENS = 1038  # of that tokenizer: the least vocab_size

Array = NDArray[np.float32]


@dataclass(frozen=True)
class CheckpointSpec:
    """Names as in transformers' configurations. Sizes that must fit: see __post_init__."""

    hidden_size: int = 64
    intermediate_size: int = 160
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    mrope_section: tuple[int, int, int] = (2, 3, 3)
    # With the real 1e6 the row and column sections hardly turn, and wrong positions go unnoticed.
    rope_theta: float = 100.0
    vocab_size: int = 1040
    tie_word_embeddings: bool = True
    embed_dim: int = 64
    depth: int = 2
    num_heads: int = 4
    mlp_ratio: int = 4
    # How it is stored.
    dtype: Literal["F32", "F16", "BF16"] = "F32"
    n_shards: int = 1
    layout: Literal["flat", "nested"] = "flat"  # config.json of 2024, or of transformers 5
    naming: Literal["hub", "nested"] = (
        "hub"  # visual.* and model.*, or model.visual.* and model.language_model.*
    )
    tokenizer: Literal["json", "vocab"] = "json"  # tokenizer.json, or vocab.json + merges.txt
    # Channels whose activations are made larger than the others', as real models have them: their norm
    # weights are scaled, by 100 in the tower, and the columns that read them scaled down, so that they matter
    # and do not drown the rest.
    outlier_channels: int = 0
    outlier_scale: float = 100.0  # in the language model
    # Qwen2's key biases: the two slowest-turning pairs of channels of every key-value head get biases of this
    # size in the first and the last layer, and of 20 between. The queries there are scaled (trained ones are
    # small).
    key_bias: float = 0.0
    key_bias_queries: float = 1.0

    def __post_init__(self) -> None:
        assert self.hidden_size % self.num_attention_heads == 0
        assert self.num_attention_heads % self.num_key_value_heads == 0
        assert 2 * sum(self.mrope_section) == self.head_dim
        assert self.embed_dim % (4 * self.num_heads) == 0
        assert self.vocab_size >= N_TOKENS

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def write_checkpoint(folder: Path, spec: CheckpointSpec, seed: int = 0) -> Path:
    """Writes a checkpoint into `folder` (created where it is not there) and returns it.

    The weights depend on the sizes and the seed alone, not on how they are stored (but for rounding).
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(spec))
    tensors = random_tensors(spec, seed)
    if spec.naming == "nested":
        tensors = {_nested_name(name): values for name, values in tensors.items()}
    _write_shards(folder, tensors, spec)
    _write_tokenizer(folder, spec)
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    _write_json(folder / "generation_config.json", _GENERATION)
    return folder


def random_tensors(spec: CheckpointSpec, seed: int) -> dict[str, Array]:
    """Every tensor by its name on the hub. Matrices keep the scale of what they read: N(0, 1 / columns)."""
    rng = np.random.default_rng(seed)
    outliers = {
        width: rng.choice(width, spec.outlier_channels, replace=False)
        for width in sorted({spec.hidden_size, spec.embed_dim})
    }

    def matrix(*shape: int) -> Array:
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def after_norm(rows: int, columns: int, scale: float = 100) -> Array:
        values = matrix(rows, columns)
        values[:, outliers[columns]] *= 1 / math.sqrt(scale)
        return values

    def norm(width: int, scale: float = 100) -> Array:
        values = (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)
        values[outliers[width]] *= scale
        return values

    def bias(width: int) -> Array:
        return (0.1 * rng.standard_normal(width)).astype(np.float32)

    scale = spec.outlier_scale
    hidden, ffn, kv = spec.hidden_size, spec.intermediate_size, spec.num_key_value_heads * spec.head_dim
    tensors = {"model.embed_tokens.weight": matrix(spec.vocab_size, hidden)}
    for i in range(spec.num_hidden_layers):
        layer = f"model.layers.{i}."
        tensors[layer + "input_layernorm.weight"] = norm(hidden, scale)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            tensors[layer + f"self_attn.{name}_proj.weight"] = after_norm(rows, hidden, scale)
            tensors[layer + f"self_attn.{name}_proj.bias"] = bias(rows)
        tensors[layer + "self_attn.o_proj.weight"] = matrix(hidden, hidden)
        tensors[layer + "post_attention_layernorm.weight"] = norm(hidden, scale)
        tensors[layer + "mlp.gate_proj.weight"] = after_norm(ffn, hidden, scale)
        tensors[layer + "mlp.up_proj.weight"] = after_norm(ffn, hidden, scale)
        tensors[layer + "mlp.down_proj.weight"] = matrix(hidden, ffn)
    tensors["model.norm.weight"] = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float32)
    if not spec.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(spec.vocab_size, hidden)

    dim, mlp = spec.embed_dim, spec.embed_dim * spec.mlp_ratio
    tensors["visual.patch_embed.proj.weight"] = matrix(dim, 3, 2, 14, 14)
    for i in range(spec.depth):
        block = f"visual.blocks.{i}."
        for name in ("norm1", "norm2"):
            tensors[block + f"{name}.weight"] = norm(dim)
            tensors[block + f"{name}.bias"] = bias(dim)
        tensors[block + "attn.qkv.weight"] = after_norm(3 * dim, dim)
        tensors[block + "attn.qkv.bias"] = bias(3 * dim)
        tensors[block + "attn.proj.weight"] = matrix(dim, dim)
        tensors[block + "attn.proj.bias"] = bias(dim)
        tensors[block + "mlp.fc1.weight"] = after_norm(mlp, dim)
        tensors[block + "mlp.fc1.bias"] = bias(mlp)
        tensors[block + "mlp.fc2.weight"] = matrix(dim, mlp)
        tensors[block + "mlp.fc2.bias"] = bias(dim)
    tensors["visual.merger.ln_q.weight"] = (1 + 0.1 * rng.standard_normal(dim)).astype(np.float32)
    tensors["visual.merger.ln_q.bias"] = bias(dim)
    tensors["visual.merger.mlp.0.weight"] = matrix(4 * dim, 4 * dim)
    tensors["visual.merger.mlp.0.bias"] = bias(4 * dim)
    tensors["visual.merger.mlp.2.weight"] = matrix(hidden, 4 * dim)
    tensors["visual.merger.mlp.2.bias"] = bias(hidden)
    if spec.key_bias:
        _bias_keys(tensors, spec, np.random.default_rng((seed, 1)))
    return tensors


def _bias_keys(tensors: dict[str, Array], spec: CheckpointSpec, rng: np.random.Generator) -> None:
    half = spec.head_dim // 2
    last = spec.num_hidden_layers - 1
    for i in range(spec.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn."
        biases = tensors[attention + "k_proj.bias"].reshape(spec.num_key_value_heads, 2, half)
        angles = rng.uniform(0, 2 * np.pi, (spec.num_key_value_heads, 2))
        size = spec.key_bias if i in (0, last) else 20
        biases[:, 0, -2:], biases[:, 1, -2:] = size * np.cos(angles), size * np.sin(angles)
        for name in ("q_proj.weight", "q_proj.bias"):
            queries = tensors[attention + name].reshape(spec.num_attention_heads, 2, half, -1)
            queries[:, :, -2:] *= spec.key_bias_queries


_OWN_DTYPES = {"int32": "I32", "uint8": "U8", "float16": "F16"}  # of arrays that are not float32


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]], dtype: str = "F32") -> None:
    """The format by hand, as numpy has no bfloat16: 8 bytes of header length, a JSON header, the data.
    `dtype` is that of float32 arrays; others stay what they are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, offset = [], 0
    for name, values in tensors.items():
        own = _OWN_DTYPES.get(values.dtype.name)
        chunk = values.tobytes() if own else _stored(values, dtype)
        header[name] = {
            "dtype": own or dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(chunk)],
        }
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))


def _stored(values: Array, dtype: str) -> bytes:
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    assert dtype == "BF16"
    bits = np.ascontiguousarray(values).view(np.uint32)
    return (
        ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    )  # round to nearest, ties to even


def _nested_name(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def _write_shards(folder: Path, tensors: dict[str, Array], spec: CheckpointSpec) -> None:
    if spec.n_shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, spec.dtype)
        return
    files = [f"model-{i + 1:05}-of-{spec.n_shards:05}.safetensors" for i in range(spec.n_shards)]
    names = list(tensors)
    parts = {
        f: names[i * len(names) // len(files) : (i + 1) * len(names) // len(files)]
        for i, f in enumerate(files)
    }
    for file, part in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part}, spec.dtype)
    size = {"F32": 4, "F16": 2, "BF16": 2}[spec.dtype]
    index = {
        "metadata": {"total_size": size * sum(values.size for values in tensors.values())},
        "weight_map": {name: file for file, part in parts.items() for name in part},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, spec: CheckpointSpec) -> None:
    files = ["tokenizer.json"] if spec.tokenizer == "json" else ["vocab.json", "merges.txt"]
    for name in (*files, "tokenizer_config.json", "chat_template.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def _config(spec: CheckpointSpec) -> dict[str, Any]:
    text: dict[str, Any] = {
        "attention_dropout": 0.0,
        "bos_token_id": 1024,
        "eos_token_id": 1026,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_key_value_heads": spec.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": spec.vocab_size,
    }
    vision: dict[str, Any] = {
        "depth": spec.depth,
        "embed_dim": spec.embed_dim,
        "hidden_size": spec.hidden_size,
        "mlp_ratio": spec.mlp_ratio,
        "num_heads": spec.num_heads,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    root: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": 1036,
        "video_token_id": 1037,
        "vision_start_token_id": 1033,
        "vision_end_token_id": 1034,
        "tie_word_embeddings": spec.tie_word_embeddings,
    }
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[spec.dtype]
    sections = list(spec.mrope_section)
    if spec.layout == "flat":
        vision |= {"in_chans": 3, "spatial_patch_size": 14}
        rope = {"rope_theta": spec.rope_theta, "rope_scaling": {"type": "mrope", "mrope_section": sections}}
        return root | text | rope | {"sliding_window": 32768, "torch_dtype": dtype, "vision_config": vision}
    text |= {
        "model_type": "qwen2_vl_text",
        "dtype": dtype,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta, "mrope_section": sections},
    }
    vision |= {"model_type": "qwen2_vl_vision", "in_channels": 3, "hidden_act": "quick_gelu"}
    return root | {"dtype": dtype, "text_config": text, "vision_config": vision}


_PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
_GENERATION = {
    "bos_token_id": 1024,
    "pad_token_id": 1024,
    "do_sample": True,
    "eos_token_id": [1026, 1024],
    "repetition_penalty": 1.0,
    "temperature": 0.01,
    "top_p": 0.001,
    "top_k": 1,
}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
