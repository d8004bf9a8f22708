"""A checkpoint's sizes, in Hugging Face's vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

# The runtime's own (csrc/model/config.cpp): far above any model of the family (72B: 29568 wide, 80 layers,
# 152064 rows), far below what overflows.
MAX_SIZE = 1 << 20


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    embed_dim: int
    num_heads: int
    intermediate_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    hidden_size: int  # the language model's, as the merger's output


class ModelShape(Protocol):
    @property
    def text(self) -> TextConfig: ...
    @property
    def vision(self) -> VisionConfig | None: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
