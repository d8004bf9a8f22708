"""The model's sizes and token ids, in Hugging Face's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Qwen2VLTextConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies turned by the temporal, row and column index
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class Qwen2VLVisionConfig:
    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    hidden_size: int  # the width that the merger projects to: the language model's
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    layer_norm_eps: float


@dataclass(frozen=True)
class Qwen2VLConfig:
    """The model's shape and tokens. A token id is None where the vocabulary has no such token."""

    text_config: Qwen2VLTextConfig
    vision_config: Qwen2VLVisionConfig | None  # None: a language model without its vision tower
    image_token_id: int | None
    video_token_id: int | None
    vision_start_token_id: int | None
    vision_end_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_native(
        cls, native: Mapping[str, Any], special_tokens: Mapping[str, int], eos_token_ids: Iterable[int]
    ) -> Qwen2VLConfig:
        """From `_native.Model.config` (the fields above; token ids -1 where absent) and the tokenizer."""
        vision = native["vision_config"]
        return cls(
            text_config=Qwen2VLTextConfig(**native["text_config"]),
            vision_config=None if vision is None else Qwen2VLVisionConfig(**vision),
            image_token_id=_present(native["image_token_id"]),
            video_token_id=_present(native["video_token_id"]),
            vision_start_token_id=special_tokens.get("<|vision_start|>"),
            vision_end_token_id=special_tokens.get("<|vision_end|>"),
            eos_token_ids=tuple(eos_token_ids),
        )

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size


def _present(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
