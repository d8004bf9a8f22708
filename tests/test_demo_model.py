"""The demo's training code must compute what transformers computes on the checkpoint that it exports."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from demo import data, export, vocabulary  # noqa: E402
from demo.batches import Assembler, Stage, assemble, cell_labels, make_batch  # noqa: E402
from demo.model import DemoModel  # noqa: E402
from demo.questions import Turn  # noqa: E402

pytestmark = pytest.mark.parity
TURNS = [Turn("differ", "What differs?", "The first has."), Turn("read", "Read it.", 'It says "K7".')]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoModel, Path]:
    torch.manual_seed(0)
    model = DemoModel()
    for p in model.parameters():
        noisy = p.data + 0.1 * torch.randn_like(p) if p.dim() == 1 else 2 * p.data
        p.data = noisy.bfloat16().float()
    folder = tmp_path_factory.mktemp("demo")
    export.export(model, folder)
    return model, folder


def test_logits_tokens_and_pixels_equal_those_of_transformers(checkpoint: tuple[DemoModel, Path]) -> None:
    """Two pictures of odd sizes and two turns. Differences are float32 rounding: logits reach about 4."""
    model, folder = checkpoint
    rng = random.Random(3)
    pictures = [
        data.draw_text(rng, 150, 90, data.Level()),
        data.draw_shapes(rng, 101, 205, data.choose_few(1, 3)),
    ]
    resized = [
        p.resized(*(round(side / data.CELL) * data.CELL for side in (p.width, p.height))) for p in pictures
    ]
    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processed = Qwen2VLImageProcessorPil.from_pretrained(folder)(
        images=[Image.fromarray(p.pixels) for p in pictures], return_tensors="pt"
    )
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": TURNS[0].question}]
    chat = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": TURNS[0].answer},
        {"role": "user", "content": TURNS[1].question},
        {"role": "assistant", "content": TURNS[1].answer},
    ]
    head, *rest = tokenizer.apply_chat_template(chat, tokenize=False).split("<|image_pad|>")
    cells = [int(g.prod()) // 4 for g in processed["image_grid_thw"]]
    text = head + "".join("<|image_pad|>" * n + part for n, part in zip(cells, rest, strict=True))
    input_ids = tokenizer([text], return_tensors="pt")["input_ids"]

    grids = [(p.height // data.CELL, p.width // data.CELL) for p in resized]
    ours, _ = assemble(Assembler(vocabulary.build()), grids, [[TURNS]])
    length = ours["input_ids"].shape[1]
    assert torch.equal(input_ids[:, :length], ours["input_ids"])
    pixels = [torch.from_numpy(p.pixels.copy())[None] for p in resized]
    rows = torch.cat([model.visual.rows(p)[0] for p in pixels])
    both_frames = rows.view(-1, 3, 1, 196).expand(-1, -1, 2, -1).reshape(len(rows), -1)
    torch.testing.assert_close(both_frames, processed["pixel_values"], rtol=0, atol=1e-5)
    with torch.no_grad():
        merged = [model.visual(p, torch.float32)[1] for p in pixels]
        hidden = model.hidden(
            ours["input_ids"], merged, ours["position_ids"], ours["segments"], torch.float32
        )
        expected = reference(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == vocabulary.TOKEN_ID["<|image_pad|>"]).int(),
            **processed,
        ).logits[:, :length]
        torch.testing.assert_close(model.logits(hidden), expected, rtol=0, atol=1e-4)


def test_conversations_about_one_picture_do_not_see_each_other(checkpoint: tuple[DemoModel, Path]) -> None:
    model, _ = checkpoint
    assembler = Assembler(vocabulary.build())
    together, _ = assemble(assembler, [], [[[TURNS[0]], [TURNS[1]]]])
    alone, _ = assemble(assembler, [], [[[TURNS[1]]]])
    with torch.no_grad():
        a, b = (
            model.hidden(t["input_ids"], [], t["position_ids"], t["segments"], torch.float32)
            for t in (together, alone)
        )
    n = int((alone["segments"] == 1).sum())
    torch.testing.assert_close(a[:, -n:], b[:, -n:], rtol=0, atol=1e-4)


def test_labels_of_an_answer_are_its_own_tokens() -> None:
    assembler = Assembler(vocabulary.build())
    batch = make_batch(assembler, random.Random(1), Stage(kinds=(0, 0, 0, 1, 0, 0), tokens=400))
    for row in range(len(batch.input_ids)):
        at = (batch.labels[row] >= 0).nonzero().flatten()
        assert torch.equal(batch.labels[row, at], batch.input_ids[row, at + 1])
        assert (batch.segments[row, at] > 0).all()


@pytest.mark.parametrize("cell", [14, 28])
def test_cell_labels_say_what_covers_a_cell(cell: int) -> None:
    picture = data.draw_shapes(random.Random(2), 112, 140, data.choose_few(3, 3))
    labels = cell_labels(picture, cell)
    assert labels["kind"].shape == (140 // cell, 112 // cell)
    for row, column in np.argwhere(labels["kind"] > 0):
        owners = picture.ids[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        thing = picture.things[int(labels["rank"][row, column])]
        assert picture.things.index(thing) + 1 in owners
        scale = np.array([112, 140, 112, 140])
        assert np.allclose(labels["box"][row, column] * scale, np.clip(thing.box, 0, scale), atol=1e-3)


def test_capitals_and_digits_are_single_tokens() -> None:
    tokens = vocabulary.build().encode('It says "K7QXAB" (123,999)').tokens
    spelled = [t for t in tokens if t.isascii() and (t.isdigit() or t.isupper())]
    assert "".join(spelled[-12:]) == "K7QXAB123999"
