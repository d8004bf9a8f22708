"""The file's keys, named and typed as llama.cpp does (Hugging Face's names stay on the reading side)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType as T
from gguf.utility import size_label

from qwen2vl_q.convert.config import CheckpointConfig, VisionConfig
from qwen2vl_q.convert.files import read_json, read_json_if_present
from qwen2vl_q.convert.recipe import FILE_TYPE_NUMBERS, Recipe
from qwen2vl_q.convert.tokenizer_files import Tokenizer
from qwen2vl_q.errors import FormatError

_LAYER_NORM_EPS = 1e-6  # fixed in transformers' vision tower and merger; config.json does not name it
_NOMINAL_IMAGE_SIZE = 560  # llama.cpp's loader wants the key; no size is special to this model
_QUANTIZATION_VERSION = 2  # of ggml's block formats
ARCHITECTURE = "qwen2vl"


@dataclass(frozen=True)
class Entry:
    key: str
    value: object
    type: T


@dataclass(frozen=True)
class Preprocessing:
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


def metadata(
    name: str, config: CheckpointConfig, recipe: Recipe, tokenizer: Tokenizer, n_parameters: int
) -> list[Entry]:
    """Every key of the file but general.architecture, which the writer puts first."""
    folder = config.path.parent
    return [
        Entry("general.type", "model", T.STRING),
        *_sampling(folder),
        Entry("general.name", name, T.STRING),
        Entry("general.size_label", size_label(n_parameters, n_parameters, 0, 0), T.STRING),
        *_text(config),
        Entry("general.file_type", FILE_TYPE_NUMBERS[recipe.type], T.UINT32),
        *_vision(config, read_preprocessing(folder, config.vision)),
        Entry("general.quantization_version", _QUANTIZATION_VERSION, T.UINT32),
        *_tokenizer(tokenizer),
    ]


def _text(config: CheckpointConfig) -> list[Entry]:
    c = config.text
    prefix = ARCHITECTURE
    return [
        Entry(f"{prefix}.block_count", c.num_hidden_layers, T.UINT32),
        Entry(f"{prefix}.context_length", c.max_position_embeddings, T.UINT32),
        Entry(f"{prefix}.embedding_length", c.hidden_size, T.UINT32),
        Entry(f"{prefix}.feed_forward_length", c.intermediate_size, T.UINT32),
        Entry(f"{prefix}.attention.head_count", c.num_attention_heads, T.UINT32),
        Entry(f"{prefix}.attention.head_count_kv", c.num_key_value_heads, T.UINT32),
        # llama.cpp has four sections for all its multimodal rotations; this model uses three.
        Entry(f"{prefix}.rope.dimension_sections", [*c.mrope_section, 0], T.ARRAY),
        Entry(f"{prefix}.rope.freq_base", c.rope_theta, T.FLOAT32),
        Entry(f"{prefix}.attention.layer_norm_rms_epsilon", c.rms_norm_eps, T.FLOAT32),
    ]


def _vision(config: CheckpointConfig, preprocessing: Preprocessing) -> list[Entry]:
    c = config.vision
    return [
        Entry("clip.has_vision_encoder", True, T.BOOL),
        Entry("clip.projector_type", "qwen2vl_merger", T.STRING),
        Entry("clip.vision.projection_dim", c.hidden_size, T.UINT32),
        Entry("clip.vision.image_size", _NOMINAL_IMAGE_SIZE, T.UINT32),
        Entry("clip.vision.patch_size", c.patch_size, T.UINT32),
        Entry("clip.vision.embedding_length", c.embed_dim, T.UINT32),
        Entry("clip.vision.feed_forward_length", c.intermediate_size, T.UINT32),
        Entry("clip.vision.block_count", c.depth, T.UINT32),
        Entry("clip.vision.attention.head_count", c.num_heads, T.UINT32),
        Entry("clip.vision.image_mean", list(preprocessing.image_mean), T.ARRAY),
        Entry("clip.vision.image_std", list(preprocessing.image_std), T.ARRAY),
        Entry("clip.vision.attention.layer_norm_epsilon", _LAYER_NORM_EPS, T.FLOAT32),
        Entry("clip.vision.spatial_merge_size", c.spatial_merge_size, T.UINT32),
        Entry("clip.vision.image_min_pixels", preprocessing.min_pixels, T.UINT32),
        Entry("clip.vision.image_max_pixels", preprocessing.max_pixels, T.UINT32),
    ]


def _tokenizer(tokenizer: Tokenizer) -> list[Entry]:
    entries = [
        Entry("tokenizer.ggml.model", "gpt2", T.STRING),
        Entry("tokenizer.ggml.pre", "qwen2", T.STRING),
        Entry("tokenizer.ggml.tokens", tokenizer.tokens, T.ARRAY),
        Entry("tokenizer.ggml.token_type", tokenizer.token_types, T.ARRAY),
        Entry("tokenizer.ggml.merges", tokenizer.merges, T.ARRAY),
    ]
    entries += [
        Entry(f"tokenizer.ggml.{k}_token_id", id, T.UINT32) for k, id in tokenizer.special_ids.items()
    ]
    if tokenizer.add_bos is not None:
        entries.append(Entry("tokenizer.ggml.add_bos_token", tokenizer.add_bos, T.BOOL))
    names = [name for name in tokenizer.chat_templates if name != "default"]
    if names:
        entries.append(Entry("tokenizer.chat_templates", names, T.ARRAY))
    for name, template in tokenizer.chat_templates.items():
        key = "tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"
        entries.append(Entry(key, template, T.STRING))
    return entries


def _sampling(folder: Path) -> list[Entry]:
    """generation_config.json's defaults; without do_sample transformers decodes greedily."""
    path = folder / "generation_config.json"
    settings = read_json_if_present(path)
    if not settings:
        return []
    known = {
        "top_k": ("top_k", T.INT32),
        "top_p": ("top_p", T.FLOAT32),
        "min_p": ("min_p", T.FLOAT32),
        "temperature": ("temp", T.FLOAT32),
        "repetition_penalty": ("penalty_repeat", T.FLOAT32),
    }
    if settings.get("do_sample") is not True:
        settings = {"temperature": 0.0, "repetition_penalty": settings.get("repetition_penalty")}
    entries = []
    for key, (name, type) in known.items():
        value = settings.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise FormatError(f"{path}: {key}: expected a number that is not negative, found {value!r}")
        entries.append(
            Entry(f"general.sampling.{name}", int(value) if type is T.INT32 else float(value), type)
        )
    return entries


def read_preprocessing(folder: Path, vision: VisionConfig) -> Preprocessing:
    """From preprocessor_config.json, or processor_config.json of newer transformers."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        settings = read_json(path)
    else:
        path = folder / "processor_config.json"
        if not path.exists():
            raise FormatError(f"{folder}: neither preprocessor_config.json nor processor_config.json")
        section = read_json(path).get("image_processor")
        if not isinstance(section, dict):
            raise FormatError(f"{path}: no image_processor")
        settings = section
    for key, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if settings.get(key, expected) != expected:
            raise FormatError(f"{path}: {key}: expected config.json's {expected}, found {settings[key]!r}")
    return Preprocessing(
        _pixels(path, settings, "min_pixels", "shortest_edge"),
        _pixels(path, settings, "max_pixels", "longest_edge"),
        _channels(path, settings, "image_mean"),
        _channels(path, settings, "image_std"),
    )


def _pixels(path: Path, settings: Mapping[str, object], key: str, size_key: str) -> int:
    """Newer files keep the limit in `size`, named as an edge; it is a number of pixels all the same."""
    value = settings.get(key)
    size = settings.get("size")
    if value is None and isinstance(size, dict):
        value = size.get(size_key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
        raise FormatError(f"{path}: {key} (or size.{size_key}): expected a number of pixels, found {value!r}")
    return value


def _channels(path: Path, settings: Mapping[str, object], key: str) -> tuple[float, float, float]:
    value = settings.get(key)
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, float) for v in value):
        raise FormatError(f"{path}: {key}: expected three numbers, found {value!r}")
    return value[0], value[1], value[2]
