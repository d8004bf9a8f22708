"""Pictures share a budget of tokens."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import Run
from qwen2vl_q import Qwen2VL
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.vision.budget import shares

SIZES = [(840, 560), (56, 56), (280, 1120)]  # 600, 4 and 400 tokens


@pytest.mark.parametrize(
    ("wanted", "budget", "expected"),
    [
        ([600, 4, 400], 2000, [600, 4, 400]),
        ([600, 4, 400], 504, [250, 4, 250]),
        ([600, 4, 400], 900, [496, 4, 400]),
        ([10, 10, 10], 3, [1, 1, 1]),
        ([], 0, []),
    ],
)
def test_shares(wanted: list[int], budget: int, expected: list[int]) -> None:
    assert shares(wanted, budget) == expected


def test_shares_are_even_and_whole() -> None:
    rng = random.Random(1)
    for _ in range(500):
        wanted = [rng.randint(1, 2000) for _ in range(rng.randint(1, 12))]
        budget = rng.randint(len(wanted), 12_000)
        got = shares(wanted, budget)
        assert all(1 <= g <= w for g, w in zip(got, wanted, strict=True))
        assert sum(got) <= budget
        cut = [g for g, w in zip(got, wanted, strict=True) if g < w]
        if cut:
            assert budget - sum(got) < len(wanted)
            assert max(got) - min(cut) <= 1
        else:
            assert got == wanted
    with pytest.raises(ValueError, match="expected 2 or more"):
        shares([5, 5], 1)


def pictures() -> list[Any]:
    """Of every kind that a picture can be given as."""
    images = [
        Image.new("RGB", size, colour) for size, colour in zip(SIZES, ("red", "lime", "navy"), strict=True)
    ]
    file = io.BytesIO()
    images[2].save(file, "PNG")
    return [images[0], np.asarray(images[1]), file.getvalue()]


def tokens(image: Any) -> int:
    found: int = math.prod(image.grid_thw) // 4
    return found


def test_a_budget_is_kept(tiny: Qwen2VL, tmp_path: Path) -> None:
    whole = tiny.load_images(pictures())
    assert list(map(tokens, whole)) == [600, 4, 400]
    for budget in (8, 100, 504, 900, 1004, 5000):
        found = list(map(tokens, tiny.load_images(pictures(), budget)))
        assert sum(found) <= budget
        assert sum(found) > 0.8 * min(budget, 1004) or budget == 8
        assert found[1] <= 4
    path = tmp_path / "a.png"
    path.write_bytes(pictures()[2])
    assert tokens(tiny.load_images([path], 100)[0]) <= 100
    assert tokens(tiny.load_images([io.BytesIO(pictures()[2])], 100)[0]) <= 100
    loaded = tiny.load_image(pictures()[2])
    assert tiny.load_images([loaded, pictures()[0]], 500)[0] is loaded
    with pytest.raises(ValueError, match="vision_tokens"):
        tiny.load_images([loaded, pictures()[0]], 400)


def test_a_conversation_takes_it(tiny: Qwen2VL) -> None:
    content = [{"type": "image", "image": picture} for picture in pictures()]
    messages = [{"role": "user", "content": content}]
    ids = tiny.config.image_token_id

    def image_tokens(**options: Any) -> int:
        answer = tiny.chat(messages, False, details=True, max_new_tokens=1, **options)
        found: int = answer.stats.prompt_image_tokens
        return found

    assert image_tokens() == 1004
    assert image_tokens(vision_tokens=200) <= 200
    assert ids is not None
    for bad in (0, -1, "x", 2):
        with pytest.raises(ValueError, match="vision_tokens"):
            image_tokens(vision_tokens=bad)


def test_the_command_line_shrinks_and_says_so(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("RGB", (1400, 1120), "teal").save(path)  # 2,000 tokens

    def told(*options: str) -> str:
        code, _, errors = run(
            "chat", "-m", tiny_gguf, "--ctx", "4096", "--image", path, "-p", "a", "-n", "1", *options
        )
        assert code == 0
        return next((line for line in errors.splitlines() if "large.png" in line), "")

    assert told().endswith("large.png: 1,280 tokens of 2,000 at full resolution (--vision-tokens 0)")
    assert told("--vision-tokens", "0") == ""
    assert told("--vision-tokens", "100") == told("--max-pixels", "3136") == ""
    assert told("--vision-tokens", "100", "-v").endswith("large.png: 88 tokens")
    assert told("--max-pixels", "3136", "-v").endswith("large.png: 2 tokens")
    assert told("--vision-tokens", "0", "-v").endswith("large.png: 2,000 tokens")


def test_later_pictures_make_room_for_themselves(tiny: Qwen2VL, tmp_path: Path) -> None:
    conversation = Conversation(tiny, None, Settings(vision_tokens=500, max_new_tokens=2))
    for i, size in enumerate(SIZES):
        Image.new("RGB", size, (i, 9, 9)).save(tmp_path / f"{i}.png")
        taken, most = conversation.attach(str(tmp_path / f"{i}.png"))
        assert most == [600, 4, 400][i]
        assert taken <= most
        assert sum(conversation.pending_tokens()) <= 500
    assert conversation.pending_tokens()[1] == 4
    list(conversation.ask("What?"))
    conversation.save(tmp_path / "talk.json")
    again = Conversation(tiny, None, Settings())
    again.load(tmp_path / "talk.json")
