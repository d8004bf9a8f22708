"""Random prompts of token ids with the expanded pad tokens of random images (ids of tests/data/tokenizer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.vision.image_processor import smart_resize

N_TEXT_TOKENS = 1024
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 1033, 1034, 1036, 1037
MIN_PIXELS, MAX_PIXELS = 3136, 12845056
Grid = tuple[int, int, int]


Parts = Sequence[int | tuple[int, int]]  # so many random text tokens, or the (height, width) of an image


@dataclass(frozen=True)
class Conversation:
    token_ids: list[int]
    images: list[NDArray[np.uint8]]


def random_image(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A smooth gradient with noise on it, so that neither resizing nor attention sees only noise."""
    y, x = np.mgrid[0:height, 0:width]
    phase = rng.uniform(0, 6, 3)
    waves = 128 + 80 * np.sin(np.stack([x / 17 + p + y / (11 + 3 * i) for i, p in enumerate(phase)], axis=-1))
    image: NDArray[np.uint8] = np.clip(waves + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
    return image


def n_cells(height: int, width: int) -> int:
    """Visual tokens of an image of this size."""
    h, w = smart_resize(height, width, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return h * w // 28**2


def conversation(seed: int, parts: Parts) -> Conversation:
    rng = np.random.default_rng(seed)
    token_ids: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, int):
            token_ids += rng.integers(0, N_TEXT_TOKENS, part).tolist()
        else:
            images.append(random_image(rng, *part))
            token_ids += [VISION_START, *[IMAGE_PAD] * n_cells(*part), VISION_END]
    return Conversation(token_ids, images)


def encoded_patches(m: Qwen2VL, pixel_values: NDArray[np.float32], grid: Grid) -> _native.Embeddings:
    embeddings = _native.VisionPass(m._native, pixel_values, grid).advance()
    assert embeddings is not None
    return embeddings
