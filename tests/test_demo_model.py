"""The demo's training code must compute what transformers computes on the checkpoint that it exports."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from demo import clips, data, evaluate, export, forms, vocabulary  # noqa: E402
from demo.batches import KIND_NAMES, Assembler, Stage, assemble, make_batch  # noqa: E402
from demo.labels import IGNORE, KINDS, MOTIONS, cell_labels, character_slots, step_labels  # noqa: E402
from demo.model import DemoModel  # noqa: E402
from demo.questions import Turn  # noqa: E402
from qwen2vl_q import Qwen2VL  # noqa: E402
from qwen2vl_q.convert import Recipe, convert_checkpoint  # noqa: E402

pytestmark = pytest.mark.parity
TURNS = [Turn("differ", "What differs?", "The first has."), Turn("read", "Read it.", 'It says "K7".')]


def shapes(seed: int) -> data.Picture:
    return data.draw_shapes(random.Random(seed), 112, 140, data.choose_few(3, 3))


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


def test_a_clip_has_the_logits_of_transformers_and_of_the_runtime(
    checkpoint: tuple[DemoModel, Path], tmp_path: Path
) -> None:
    """Eight frames, each pair through its own slices of the patch embedding, and the text behind."""
    model, folder = checkpoint
    clip = clips.draw_bounce(random.Random(5), 112, 140, 3)
    ours, _ = assemble(Assembler(vocabulary.build()), [(4, 5, 4)], [[TURNS[:1]]])
    with torch.no_grad():
        _, cells = model.visual(torch.from_numpy(clip.frames)[None], torch.float32)
        assert cells.shape == (4, 20, model.sizes.hidden_size)
        merged = [cells.reshape(1, 80, -1)]
        found = model.logits(
            model.hidden(ours["input_ids"], merged, ours["position_ids"], ours["segments"], torch.float32)
        )
        reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        input_ids = ours["input_ids"]
        expected = reference(
            input_ids=input_ids,
            mm_token_type_ids=2 * (input_ids == vocabulary.TOKEN_ID["<|video_pad|>"]).int(),
            **evaluate.video_inputs([[Image.fromarray(frame) for frame in clip.frames]]),
        ).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    convert_checkpoint(folder, tmp_path / "clip.gguf", Recipe("f32"), "clip")
    runtime = Qwen2VL.from_gguf(tmp_path / "clip.gguf", precision="exact")
    video = {"type": "video", "video": list(clip.frames), "min_pixels": evaluate.MIN_PIXELS}
    question = {"type": "text", "text": TURNS[0].question}
    ids, items = runtime.encode_chat([{"role": "user", "content": [video, question]}])
    assert ids == input_ids[0, : len(ids)].tolist()
    assert np.array_equal(runtime.position_ids(ids, [(4, 10, 8)]), ours["position_ids"][:, 0, : len(ids)])
    np.testing.assert_allclose(runtime.logits(ids, items), found[0, : len(ids)].numpy(), atol=1e-3)


def test_a_still_clip_is_its_picture(checkpoint: tuple[DemoModel, Path]) -> None:
    model, _ = checkpoint
    picture = torch.from_numpy(shapes(3).pixels.copy())[None]
    with torch.no_grad():
        for still, clip in zip(
            model.visual(picture, torch.float32),
            model.visual(torch.stack([picture] * 4, 1), torch.float32),
            strict=True,
        ):
            torch.testing.assert_close(clip, still.expand_as(clip), rtol=0, atol=1e-4)


def test_the_tokenizer_is_the_checkpoints() -> None:
    """Training goes on from it, so that its corpus must not change."""
    committed = Path(export.__file__).with_name("checkpoint") / "tokenizer.json"
    assert vocabulary.build().to_str() == Tokenizer.from_file(str(committed)).to_str()


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


@pytest.mark.parametrize("kind", range(len(KIND_NAMES)))
def test_labels_of_an_answer_are_its_own_tokens(kind: int) -> None:
    assembler = Assembler(vocabulary.build())
    kinds = tuple(float(k == kind) for k in range(len(KIND_NAMES)))
    batch = make_batch(assembler, random.Random(1), Stage(kinds=kinds, tokens=400))
    assert batch.kind == KIND_NAMES[kind]
    for row in range(len(batch.input_ids)):
        at = (batch.labels[row] >= 0).nonzero().flatten()
        assert torch.equal(batch.labels[row, at], batch.input_ids[row, at + 1])
        assert (batch.segments[row, at] > 0).all()


def test_step_labels_say_where_a_thing_goes() -> None:
    """Along with which, in every cell that it covers in either frame of the step."""
    clip = clips.draw_bounce(random.Random(4), 140, 112, 2)
    for step in range(4):
        before, after = clip.paths[0][2 * step : 2 * step + 2]
        labels = step_labels(clip, step, 28)
        at = labels["kind"] > 0
        assert {KINDS[clip.things[0].name]} == set(labels["kind"][at].tolist())
        assert {MOTIONS.index(clips.motion(before, after))} == set(labels["motion"][at].tolist())
        touching = any(frame in clip.touches for frame in (2 * step, 2 * step + 1))
        assert {int(touching)} == set(labels["touch"][at].tolist())
        assert set(labels["motion"][~at].tolist()) == {IGNORE}


def test_slots_of_a_form_spell_its_values() -> None:
    """Line by line: a row of cells holds the middle of one line at most."""
    for seed in range(20):
        picture = forms.draw_form(random.Random(seed), 224, 168)
        slots = character_slots(picture)
        spelled = [
            "".join(data.CHARACTERS[row[:, k].max() - 1] for k in range(data.MAX_TEXT) if row[:, k].any())
            for row in slots
        ]
        assert [s for s in spelled if s] == [value for _, value in picture.fields]


@pytest.mark.parametrize("cell", [14, 28])
def test_cell_labels_say_what_covers_a_cell(cell: int) -> None:
    picture = shapes(2)
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
