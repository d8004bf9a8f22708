"""config.json of a Qwen2-VL checkpoint: the flat layout of 2024 and the nested one of newer transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.json_files import as_float32, quoted, read_json
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.shapes import MAX_SIZE, TextConfig, VisionConfig
from qwen2vl_q.convert.quantization import Packing, read_packing

# Values that transformers leaves out of a saved config.json where they equal its defaults
# (Qwen2VLTextConfig, Qwen2VLVisionConfig). Shapes are checked against the tensors afterwards.
_TEXT_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "max_window_layers": 80,
    "tie_word_embeddings": False,
    "rope_theta": 1e6,
}
_VISION_DEFAULTS: Mapping[str, object] = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
_MAX_LAYERS = 1024
_MAX_HEADS = 4096
_MAX_CONTEXT = 1 << 24
_MAX_PATCH_SIZE = 1024
_MAX_MERGE_SIZE = 16
_VISION_ROPE_THETA = 10000.0  # GGUF has no key for it: the runtimes hold it as a constant


@dataclass(frozen=True)
class CheckpointConfig:
    path: Path
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    token_ids: Mapping[str, int]  # "image_token_id": 151655, ...: those that config.json gives
    packing: Packing | None  # of the matrices that are quantized already


class _Section:
    """Look-ups in JSON objects, the first that has the key; errors name the file, the key and the value."""

    def __init__(self, path: Path, objects: Sequence[Mapping[str, object]], defaults: Mapping[str, object]):
        self._path = path
        self._objects = (*objects, defaults)

    def value(self, key: str, *aliases: str) -> object:
        for candidate in self._objects:
            for name in (key, *aliases):
                if candidate.get(name) is not None:
                    return candidate[name]
        return None

    def size(self, key: str, *aliases: str, limit: int = MAX_SIZE) -> int:
        value = self.value(key, *aliases)
        if isinstance(value, float) and value.is_integer():  # mlp_ratio is 4.0 in some files
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise self.error(key, f"an integer from 1 to {limit}", value)
        return value

    def number(self, key: str, expected: str = "a positive number", limit: float = math.inf) -> float:
        value = self.value(key)
        number = as_float32(value)
        if number is None or not 0 < number < limit:
            raise self.error(key, expected, value)
        return number

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def require(self, key: str, expected: object) -> None:
        """Raises UnsupportedError where a value other than the only one that the runtime computes is set."""
        value = self.value(key)
        if value != expected:
            raise UnsupportedError(
                f"{self._path}: {key}: only {expected!r} is supported, found {quoted(value)}"
            )

    def error(self, key: str, expected: str, found: object) -> FormatError:
        return FormatError(f"{self._path}: {key}: expected {expected}, found {quoted(found)}")


def read_config(folder: Path) -> CheckpointConfig:
    """Reads folder/config.json. UnsupportedError for another architecture, FormatError for bad values."""
    path = folder / "config.json"
    if not path.exists():
        raise FormatError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint")
    root = read_json(path)
    if root.get("model_type") == "colqwen2":  # transformers' own wrapper; its files begin names with "vlm."
        root = _object(path, root, "vlm_config")
    _check_architecture(path, root)
    nested = _object(path, root, "text_config")
    vision_object = _object(path, root, "vision_config")
    sections: list[Mapping[str, object]] = [nested, root] if nested else [root]
    text = _read_text(path, sections)
    vision = _read_vision(path, vision_object, text.hidden_size)
    # transformers ties where either place says so: files saved before version 5 say it in text_config.
    tied = any(_Section(path, [s], _TEXT_DEFAULTS).flag("tie_word_embeddings") for s in sections)
    ids = {
        key: value
        for section in reversed(sections)
        for key, value in section.items()
        if key.endswith("_token_id") and isinstance(value, int) and not isinstance(value, bool)
    }
    return CheckpointConfig(path, text, vision, tied, ids, read_packing(path, root))


def _object(path: Path, root: Mapping[str, object], key: str) -> dict[str, object]:
    value = root.get(key, {})
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {key}: expected an object, found {quoted(value)}")
    return value


def _check_architecture(path: Path, root: Mapping[str, object]) -> None:
    model_type = root.get("model_type")
    if model_type != "qwen2_vl":
        raise UnsupportedError(
            f"{path}: model_type: expected 'qwen2_vl', found {quoted(model_type)} "
            f"({printable(root.get('architectures'))})"
        )


def _read_text(path: Path, sections: list[Mapping[str, object]]) -> TextConfig:
    # The flat layout names its table of rotations rope_scaling, the nested one rope_parameters.
    ropes = [
        _object(path, s, key) for s in sections for key in ("rope_parameters", "rope_scaling") if s.get(key)
    ]
    keys = _Section(path, sections, _TEXT_DEFAULTS)
    keys.require("hidden_act", "silu")
    _require_full_attention(path, keys)
    rope = _Section(path, ropes, {"rope_type": "default"})
    kind = rope.value("rope_type", "type")
    if kind not in ("default", "mrope"):
        raise UnsupportedError(
            f"{path}: rope_scaling: only M-RoPE without rescaling is supported, found {quoted(kind)}"
        )
    text = TextConfig(
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        intermediate_size=keys.size("intermediate_size"),
        num_hidden_layers=keys.size("num_hidden_layers", limit=_MAX_LAYERS),
        num_attention_heads=keys.size("num_attention_heads", limit=_MAX_HEADS),
        num_key_value_heads=keys.size("num_key_value_heads", limit=_MAX_HEADS),
        max_position_embeddings=keys.size("max_position_embeddings", limit=_MAX_CONTEXT),
        rms_norm_eps=keys.number("rms_norm_eps", "a number in (0, 1)", limit=1),
        # Inside the table it counts more than beside it, as in transformers.
        rope_theta=_Section(path, [*ropes, *sections], _TEXT_DEFAULTS).number("rope_theta"),
        mrope_section=_mrope_section(rope),
    )
    _check_divides(path, "hidden_size", text.hidden_size, "num_attention_heads", text.num_attention_heads)
    _check_divides(
        path, "num_attention_heads", text.num_attention_heads, "num_key_value_heads", text.num_key_value_heads
    )
    head_dim = keys.value("head_dim")
    if head_dim is not None and head_dim != text.head_dim:
        raise UnsupportedError(
            f"{path}: head_dim: only hidden_size / num_attention_heads = {text.head_dim} is supported, "
            f"found {quoted(head_dim)}"
        )
    if 2 * sum(text.mrope_section) != text.head_dim:
        raise FormatError(
            f"{path}: mrope_section: expected the sum head_dim / 2 = {text.head_dim / 2:g}, "
            f"found {list(text.mrope_section)}"
        )
    return text


def _require_full_attention(path: Path, keys: _Section) -> None:
    """A window is used by layers from max_window_layers on, as in transformers: by none in many files."""
    types = keys.value("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        raise UnsupportedError(
            f"{path}: layer_types: only 'full_attention' is supported, found {quoted(types)}"
        )
    first = keys.value("max_window_layers")
    slides = not isinstance(first, int) or first < keys.size("num_hidden_layers", limit=_MAX_LAYERS)
    if types is None and slides:
        keys.require("use_sliding_window", False)


def _mrope_section(rope: _Section) -> tuple[int, int, int]:
    value = rope.value("mrope_section")
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_SIZE for n in value)
    ):
        raise rope.error("mrope_section", "three integers", value)
    return value[0], value[1], value[2]


def _read_vision(path: Path, section: Mapping[str, object], text_hidden_size: int) -> VisionConfig:
    keys = _Section(path, [section], {**_VISION_DEFAULTS, "hidden_size": text_hidden_size})
    keys.require("hidden_act", "quick_gelu")
    # The tower's table is only written by newer transformers; "axial" is its name for row and column.
    rope = _Section(path, [_object(path, section, "rope_parameters")], {"rope_theta": _VISION_ROPE_THETA})
    rope.require("rope_theta", _VISION_ROPE_THETA)
    keys.require("temporal_patch_size", 2)  # the format names two slices of the patch embedding
    keys.require("in_channels", 3)  # not in_chans, which the flat layout writes and transformers ignores
    vision = VisionConfig(
        depth=keys.size("depth", limit=_MAX_LAYERS),
        embed_dim=keys.size("embed_dim"),
        num_heads=keys.size("num_heads", limit=_MAX_HEADS),
        intermediate_size=keys.size("embed_dim") * keys.size("mlp_ratio"),
        in_channels=keys.size("in_channels"),
        patch_size=keys.size("patch_size", limit=_MAX_PATCH_SIZE),
        temporal_patch_size=keys.size("temporal_patch_size"),
        spatial_merge_size=keys.size("spatial_merge_size", limit=_MAX_MERGE_SIZE),
        hidden_size=keys.size("hidden_size"),
    )
    _check_divides(path, "vision embed_dim", vision.embed_dim, "4 num_heads", 4 * vision.num_heads)
    if vision.hidden_size != text_hidden_size:
        raise FormatError(
            f"{path}: vision_config.hidden_size: expected the language model's {text_hidden_size}, "
            f"found {vision.hidden_size}"
        )
    return vision


def _check_divides(path: Path, name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise FormatError(f"{path}: {name} {value} is not a multiple of {divisor_name} {divisor}")
