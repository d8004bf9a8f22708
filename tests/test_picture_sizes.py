"""The size of a picture, as a message's part asks for it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pictures import picture
from qwen2vl_q import Qwen2VL
from qwen2vl_q.chat.messages import LOW_DETAIL_PIXELS

CELL = 28 * 28


def tokens(model: Qwen2VL, **asked: Any) -> int:
    content = [{"type": "image", "image": picture(900, 1200), **asked}]
    _, [image] = model.encode_chat([{"role": "user", "content": content}])
    return math.prod(image.grid_thw) // 4


def test_parts_ask_for_sizes(tiny: Qwen2VL) -> None:
    whole = tokens(tiny)
    assert whole * CELL > LOW_DETAIL_PIXELS
    assert tokens(tiny, detail="high") == tokens(tiny, detail="auto") == whole
    low = tokens(tiny, detail="low")
    assert LOW_DETAIL_PIXELS * 0.9 < low * CELL <= LOW_DETAIL_PIXELS
    assert tokens(tiny, detail="low", max_pixels=20 * CELL) <= 20  # what is said in numbers counts
    assert tokens(tiny, detail="low", min_pixels=600 * CELL) > low
    assert tokens(tiny, resized_height=56, resized_width=280) == 2 * 10
    assert tokens(tiny, max_pixels=50 * CELL, min_pixels=40 * CELL) in range(40, 51)
    image = tiny.load_image(picture(900, 1200), resized=(56, 280))
    assert image.grid_thw == (1, 4, 20)
    with pytest.raises(ValueError, match="message 0, part 0: unknown key size"):
        tokens(tiny, size="small")
