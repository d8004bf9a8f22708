"""What a model of a known shape can be expected to do on a machine, before there is a file: operations and
bytes of its forward passes, at the machine's limits, at the share of them that the kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2vl_q.engine.config import Qwen2VLTextConfig, Qwen2VLVisionConfig
from qwen2vl_q.engine.stats import Stage
from qwen2vl_q.measure.limits import Limits
from qwen2vl_q.vision.image_processor import smart_resize

PHOTO = (1024, 683)  # width, height
PROMPT_TOKENS, CONTEXT_TOKENS = 512, 4096

# Bits a weight of what `convert` writes by default: Q4_0, the head (and its embedding) Q6_K, the tower Q8_0.
_TEXT_BITS, _HEAD_BITS, _VISION_BITS = 4.5, 6.5625, 8.5
_CELL_BYTES = 2  # of a key's or value's element
_PROGRAM_BYTES = 60e6  # Python, its packages, the tokenizer
_PICTURE_ROW_FLOATS = 5  # of a patch's embed_dim: residual, queries, keys and values, panels of these


@dataclass(frozen=True)
class Shape:
    name: str
    text: Qwen2VLTextConfig
    vision: Qwen2VLVisionConfig


@dataclass(frozen=True)
class Shares:
    """Of the floors that `qwen2vl-q bench` shows, the fractions that images and prefill reach; and of the
    8-bit peak that of a single row's products, which decoding adds to the reading of weights."""

    image: float
    prefill: float
    row: float


# Measured (bench/README.md); other sets of vectors are between these. Images can be above 1: the floor has
# the tower's attention in floats, these sets have it in integers.
_SHARES = {
    "avx512_bf16": Shares(0.77, 0.78, 0.32),
    "avx512": Shares(1.15, 0.78, 0.32),
    "avxvnni": Shares(1.2, 0.72, 0.35),
    "avx2": Shares(0.67, 0.7, 0.5),
    "generic": Shares(0.47, 0.38, 0.12),
}
_OTHERS = Shares(0.6, 0.65, 0.4)


@dataclass(frozen=True)
class Expectation:
    """About what to expect, with the default types."""

    model: str
    photo_seconds: float  # PHOTO through the vision tower
    prefill_tokens_per_second: float  # of PROMPT_TOKENS
    decode_tokens_per_second: float  # at an empty context
    memory_bytes: float  # with a photo and CONTEXT_TOKENS


def qwen2vl(
    name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Shape:
    """Those that Qwen has published share everything else."""
    text = Qwen2VLTextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )
    vision = Qwen2VLVisionConfig(
        depth=32,
        embed_dim=1280,
        num_heads=16,
        intermediate_size=5120,
        hidden_size=hidden,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        in_channels=3,
        layer_norm_eps=1e-6,
    )
    return Shape(name, text, vision)


SHAPES = (
    qwen2vl("2B", 1536, 8960, 12, 2, 151936, True),
    qwen2vl("7B", 3584, 18944, 28, 4, 152064, False),
)


def layer_weights(text: Qwen2VLTextConfig) -> int:
    """Of all decoder layers' matrices."""
    heads = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    attention = text.hidden_size * (2 * heads + 2 * kv)
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def block_weights(vision: Qwen2VLVisionConfig) -> int:
    """Of all the tower's blocks' matrices."""
    return vision.depth * (4 * vision.embed_dim**2 + 2 * vision.embed_dim * vision.intermediate_size)


def merger_weights(vision: Qwen2VLVisionConfig) -> int:
    merged = vision.embed_dim * vision.spatial_merge_size**2
    return merged * (merged + vision.hidden_size)


def patches(vision: Qwen2VLVisionConfig, size: tuple[int, int]) -> int:
    """Of a picture (width, height)."""
    width, height = size
    rows, columns = smart_resize(height, width, vision.patch_size * vision.spatial_merge_size)
    return rows // vision.patch_size * (columns // vision.patch_size)


def image_stages(vision: Qwen2VLVisionConfig, n_patches: int) -> list[Stage]:
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = n_patches / vision.spatial_merge_size**2
    attention = 4.0 * vision.depth * n_patches**2 * vision.embed_dim
    linear = n_patches * block_weights(vision) + merged * merger_weights(vision)
    embed = n_patches * patch * vision.embed_dim
    return [
        Stage("image linear", 1, 0, 2 * linear, 2 * embed, 0),
        Stage("image attention", 1, 0, 0, attention, 0),
    ]


def prefill_stages(text: Qwen2VLTextConfig, n_tokens: int) -> list[Stage]:
    """The head is the last token's alone."""
    head = text.hidden_size * text.vocab_size
    return [Stage("text linear", 1, 0, 2.0 * (n_tokens * layer_weights(text) + head), 0, 0)]


def decode_stages(text: Qwen2VLTextConfig) -> list[Stage]:
    """Of one token at an empty context."""
    head = text.hidden_size * text.vocab_size
    n_bytes = (layer_weights(text) * _TEXT_BITS + head * _HEAD_BITS) / 8
    return [Stage("text linear", 1, 0, 2.0 * (layer_weights(text) + head), 0, n_bytes)]


def memory_bytes(shape: Shape) -> float:
    """With a photo and CONTEXT_TOKENS: weights, cache, a picture on its way, the program."""
    text, vision = shape.text, shape.vision
    embedding = text.hidden_size * text.vocab_size * (1 if text.tie_word_embeddings else 2)
    tower = block_weights(vision) + merger_weights(vision)
    weights = layer_weights(text) * _TEXT_BITS + embedding * _HEAD_BITS + tower * _VISION_BITS
    kv = 2 * text.num_key_value_heads * text.head_dim * text.num_hidden_layers * _CELL_BYTES
    picture = patches(vision, PHOTO) * vision.embed_dim * 4 * _PICTURE_ROW_FLOATS
    return weights / 8 + CONTEXT_TOKENS * kv + picture + _PROGRAM_BYTES


def expect(shape: Shape, limits: Limits) -> Expectation:
    shares = _SHARES.get(limits.isa, _OTHERS)
    image = limits.image_floor(image_stages(shape.vision, patches(shape.vision, PHOTO))) / shares.image
    prefill = limits.prefill_floor(prefill_stages(shape.text, PROMPT_TOKENS)) / shares.prefill
    token = decode_stages(shape.text)
    decode = limits.read_floor(token) + limits.compute_floor(token) / shares.row
    return Expectation(shape.name, image, PROMPT_TOKENS / prefill, 1 / decode, memory_bytes(shape))
