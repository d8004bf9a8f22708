"""The messages of the model card of Qwen2-VL, as they stand there but for the files: one picture, several,
clips, a batch, pictures by address, base64 and size. `chat` takes them where the card has a processor."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from films import encoded
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo.cards import article, example, listing

WHAT = "What is in the picture?"


@pytest.fixture(scope="module")
def model() -> Qwen2VL:
    return Qwen2VL.from_gguf(DEMO_MODEL)


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("cards")
    for seed in range(4):
        example(seed)[0].save(folder / f"image{seed}.jpg", quality=95)
    return [folder / f"image{seed}.jpg" for seed in range(4)]


def truth(seed: int) -> list[str]:
    return sorted(
        listing([article(t.full_name) for t in example(seed)[1]]).replace(" and ", ", ").split(", ")
    )


def things(answer: str) -> list[str]:
    return sorted(answer.lower().rstrip(".").replace(" and ", ", ").split(", "))


def ask(model: Qwen2VL, messages: Any) -> Any:
    return model.chat(messages, stream=False, temperature=0, max_new_tokens=64)


@pytest.mark.parametrize("form", ["path", "file", "base64"])
def test_one_image(model: Qwen2VL, cards: list[Path], form: str) -> None:
    encoding = base64.b64encode(cards[0].read_bytes()).decode()
    image = {"path": str(cards[0]), "file": cards[0].as_uri(), "base64": f"data:image;base64,{encoding}"}[
        form
    ]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": WHAT}]}
    ]
    assert things(ask(model, messages)) == truth(0)


def test_several_images(model: Qwen2VL, cards: list[Path]) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": cards[0].as_uri()},
                {"type": "image", "image": cards[2].as_uri()},
                {"type": "text", "text": "Which picture has a red star?"},
            ],
        }
    ]
    assert ask(model, messages) == "The second picture."


def test_a_list_of_frames(model: Qwen2VL, cards: list[Path]) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {
                    "type": "video",
                    "video": [cards[0].as_uri(), cards[0].as_uri()],
                    "fps": 1.0,
                    "resized_height": 168,
                    "resized_width": 168,
                },
                {"type": "text", "text": WHAT},
            ],
        }
    ]
    assert things(ask(model, messages)) == truth(0)


def test_a_video_file(model: Qwen2VL, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="needs the extra video")
    card = example(3)[0].resize((168, 168), Image.Resampling.BICUBIC)
    (tmp_path / "video1.mp4").write_bytes(encoded([np.asarray(card)] * 20, fps=10))
    messages = [
        {
            "role": "user",
            "content": [
                {
                    "type": "video",
                    "video": (tmp_path / "video1.mp4").as_uri(),
                    "max_pixels": 168 * 168,
                    "max_frames": 2,
                },
                {"type": "text", "text": WHAT},
            ],
        }
    ]
    assert things(ask(model, messages)) == truth(3)


def test_a_batch(model: Qwen2VL, cards: list[Path]) -> None:
    messages1 = [
        {
            "role": "user",
            "content": [{"type": "image", "image": cards[3].as_uri()}, {"type": "text", "text": WHAT}],
        }
    ]
    messages2 = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Who are you?"},
    ]
    first, second = ask(model, [messages1, messages2])
    assert things(first) == truth(3)
    assert second == "I am a small demo model. I answer questions about simple pictures."


def test_sizes(model: Qwen2VL, cards: list[Path]) -> None:
    """min_pixels and max_pixels, and resized_height and resized_width, of each picture."""
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": cards[0].as_uri(), "resized_height": 168, "resized_width": 196},
                {"type": "image", "image": cards[0].as_uri(), "min_pixels": 50176, "max_pixels": 50176},
                {"type": "text", "text": WHAT},
            ],
        }
    ]
    _, images = model.encode_chat(messages)
    assert images[0].grid_thw == (1, 12, 14)
    assert images[1].grid_thw == (1, 16, 18)  # qwen-vl-utils' rule: the bound below comes first, rounded up
