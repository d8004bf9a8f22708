"""What comes before the forward passes: text and pictures become tokens and pixels."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from qwen2vl_q import Qwen2VL
from qwen2vl_q.chat.messages import normalize
from qwen2vl_q.measure.benchmark import drawn_picture
from suite import Recorder

TEXT = (
    "The quick brown fox jumps over the lazy dog; in 1,234 words or fewer, what does it say? "
    "Зелёный круг слева, 三角形在右边. for (int i = 0; i < n; ++i) sum += x[i];\n"
) * 50


@pytest.mark.benchmark(group="tokenizer")
def test_tokenize(record: Recorder, model: Qwen2VL) -> None:
    record.call(model.tokenize, TEXT, tokens=len(model.tokenize(TEXT)))


@pytest.mark.benchmark(group="tokenizer")
def test_detokenize(record: Recorder, model: Qwen2VL) -> None:
    ids = model.tokenize(TEXT)
    assert model.detokenize(ids) == TEXT
    record.call(model.detokenize, ids, tokens=len(ids))


def conversation(turns: int) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "What is on the left of it?"} for i in range(2 * turns - 1)]


@pytest.mark.benchmark(group="chat template")
@pytest.mark.parametrize("turns", [1, 20])
def test_template(record: Recorder, model: Qwen2VL, turns: int) -> None:
    messages = [message.for_template() for message in normalize(conversation(turns))]
    record.call(model.template.render, messages, tokens=len(model.encode_chat(conversation(turns))[0]))


@pytest.mark.benchmark(group="chat template")
@pytest.mark.parametrize("turns", [1, 20])
def test_encode_chat(record: Recorder, model: Qwen2VL, turns: int) -> None:
    """Rendered and tokenized."""
    messages = conversation(turns)
    record.call(model.encode_chat, messages, tokens=len(model.encode_chat(messages)[0]))


@pytest.mark.benchmark(group="image preprocessing")
@pytest.mark.parametrize("format", ["pixels", "PNG", "JPEG"])
@pytest.mark.parametrize("size", [(336, 224), (1024, 683)], ids=["336x224", "1024x683"])
def test_load_image(record: Recorder, model: Qwen2VL, size: tuple[int, int], format: str) -> None:
    """Decoded, where it is a file, and resized; tokens are those that the tower will make of it."""
    pixels = drawn_picture(size)
    file = io.BytesIO()
    if format != "pixels":
        Image.fromarray(pixels).save(file, format)
    t, h, w = model.load_image(pixels).grid_thw
    tokens = t * h * w // model.image_processor.merge_size**2
    record.call(model.load_image, file.getvalue() or pixels, tokens=tokens)
