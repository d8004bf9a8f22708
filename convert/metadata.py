"""The file's keys, named and typed as llama.cpp does (Hugging Face's names stay on the reading side)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFValueType as T
from gguf.utility import size_label

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.json_files import as_float32, quoted, read_json, read_json_if_present
from qwen2vl_q.checkpoint.shapes import VisionConfig
from qwen2vl_q.convert.config import CheckpointConfig
from qwen2vl_q.convert.entries import Entry
from qwen2vl_q.convert.recipe import FILE_TYPE_NUMBERS
from qwen2vl_q.convert.tokenizer_files import Tokenizer
from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.vision.image_processor import ImageProcessor

_LAYER_NORM_EPS = 1e-6  # fixed in transformers' vision tower and merger; config.json does not name it
_NOMINAL_IMAGE_SIZE = 560  # llama.cpp's loader wants the key; no size is special to this model
_QUANTIZATION_VERSION = 2  # of ggml's block formats
ARCHITECTURE = "qwen2vl"


def metadata(
    name: str,
    config: CheckpointConfig,
    type: str,
    tokenizer: Tokenizer,
    n_parameters: int,
    heads: Sequence[str] = (),
) -> list[Entry]:
    """Every key of the file but general.architecture, which the writer puts first. `type` is the file's, by
    its name in FILE_TYPE_NUMBERS. `heads`: the names of linear maps of the last hidden states (after the last
    norm), which the file holds as head.NAME.weight [outputs, hidden] and perhaps head.NAME.bias."""
    folder = config.path.parent
    return [
        Entry("general.type", "model", T.STRING),
        *_sampling(folder),
        Entry("general.name", name, T.STRING),
        Entry("general.size_label", size_label(n_parameters, n_parameters, 0, 0), T.STRING),
        *_text(config),
        Entry("general.file_type", FILE_TYPE_NUMBERS[type], T.UINT32),
        *_vision(config, _preprocessing(folder, config.vision)),
        Entry("general.quantization_version", _QUANTIZATION_VERSION, T.UINT32),
        *_tokenizer(tokenizer),
        *([Entry(f"{ARCHITECTURE}.heads", list(heads), T.ARRAY)] if heads else []),
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


def _vision(config: CheckpointConfig, preprocessing: Sequence[Entry]) -> list[Entry]:
    c = config.vision
    mean, std, *pixels = preprocessing
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
        mean,
        std,
        Entry("clip.vision.attention.layer_norm_epsilon", _LAYER_NORM_EPS, T.FLOAT32),
        Entry("clip.vision.spatial_merge_size", c.spatial_merge_size, T.UINT32),
        *pixels,
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
    if settings.get("do_sample") is not True:
        settings = {"temperature": 0.0, "repetition_penalty": settings.get("repetition_penalty")}
    entries = []
    top_k = settings.get("top_k")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 0 <= top_k < 1 << 31:
            raise FormatError(f"{path}: top_k: expected 0 (all) or more, found {quoted(top_k)}")
        entries.append(Entry("general.sampling.top_k", top_k, T.INT32))
    for key, name in (
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temperature", "temp"),
        ("repetition_penalty", "penalty_repeat"),
    ):
        if settings.get(key) is not None:
            number = as_float32(settings[key])
            if number is None:
                raise FormatError(f"{path}: {key}: expected a number, found {quoted(settings[key])}")
            entries.append(Entry(f"general.sampling.{name}", number, T.FLOAT32))
    try:
        Sampling.from_metadata(_as_read(entries), str(path)).sampler()
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    return entries


def _preprocessing(folder: Path, vision: VisionConfig) -> list[Entry]:
    path, settings = _preprocessor_settings(folder)
    for key, expected in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if settings.get(key, expected) != expected:
            raise FormatError(
                f"{path}: {key}: expected config.json's {expected}, found {quoted(settings[key])}"
            )
    entries = [
        Entry("clip.vision.image_mean", _channels(path, settings, "image_mean"), T.ARRAY),
        Entry("clip.vision.image_std", _channels(path, settings, "image_std"), T.ARRAY),
        Entry(
            "clip.vision.image_min_pixels", _pixels(path, settings, "min_pixels", "shortest_edge"), T.UINT32
        ),
        Entry(
            "clip.vision.image_max_pixels", _pixels(path, settings, "max_pixels", "longest_edge"), T.UINT32
        ),
    ]
    ImageProcessor.from_metadata(_as_read(entries), str(path))  # raises where the runtime would
    return entries


def _as_read(entries: Sequence[Entry]) -> dict[str, object]:
    """The keys as the runtime will find them in the file."""
    return {entry.key: entry.value for entry in entries}


def _preprocessor_settings(folder: Path) -> tuple[Path, Mapping[str, object]]:
    """Of preprocessor_config.json, or processor_config.json of newer transformers."""
    path = folder / "preprocessor_config.json"
    if path.exists():
        return path, read_json(path)
    path = folder / "processor_config.json"
    if not path.exists():
        raise FormatError(f"{folder}: neither preprocessor_config.json nor processor_config.json")
    section = read_json(path).get("image_processor")
    if not isinstance(section, dict):
        raise FormatError(f"{path}: no image_processor")
    return path, section


def _pixels(path: Path, settings: Mapping[str, object], key: str, size_key: str) -> int:
    """Newer files keep the limit in `size`, named as an edge; it is a number of pixels all the same."""
    value = settings.get(key)
    size = settings.get("size")
    if value is None and isinstance(size, dict):
        value = size.get(size_key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 32:
        raise FormatError(
            f"{path}: {key} (or size.{size_key}): expected a number of pixels, found {quoted(value)}"
        )
    return value


def _channels(path: Path, settings: Mapping[str, object], key: str) -> list[float]:
    value = settings.get(key)
    numbers = [as_float32(v) for v in value] if isinstance(value, list) and len(value) == 3 else []
    found = [number for number in numbers if number is not None]
    if len(found) != 3:
        raise FormatError(f"{path}: {key}: expected three numbers, found {quoted(value)}")
    return found
