"""Boxes and points: read from answers, found in pictures, drawn."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import Run
from demo import cases
from qwen2vl_q import DEMO_MODEL, Qwen2VL, Region, parse_grounding
from qwen2vl_q.vision.drawing import draw_regions

OBJECT, BOX = "<|object_ref_start|>{}<|object_ref_end|>", "<|box_start|>{}<|box_end|>"
SIZE = (2000, 500)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (OBJECT.format(" a cat ") + BOX.format("(100,200),(500,1000)"), [("a cat", (200, 100, 1000, 500))]),
        (BOX.format("(500,1000),(100,200)"), [("", (200, 100, 1000, 500))]),
        (BOX.format("(100,200)"), [("", (200, 100, 200, 100))]),
        (
            OBJECT.format("dogs") + BOX.format("(0,0),(1,2)") + " and " + BOX.format("(10,20),(30,40)"),
            [("dogs", (0, 0, 2, 1)), ("dogs", (20, 10, 60, 20))],
        ),
        ("<|quad_start|>(1,1),(9,2),(8,8),(2,9)<|quad_end|>", [("", (2, 0.5, 18, 4.5))]),
        (BOX.format("100 200 300 400"), [("", (200, 100, 600, 200))]),
        ("It is at (100,200),(300,400).", [("", (200, 100, 600, 200))]),
        ("Click (100, 200).", [("", (200, 100, 200, 100))]),
        (OBJECT.format("x") + "<|box_start|>(1,2),(3,4)", [("x", (2, 1, 6, 2))]),
        (OBJECT.format("x") + "<|box_start|>(1,2),(3", []),
        (OBJECT.format("x") + "<|box_start|>(1,2)", []),
        ("<|object_ref_start|>cut", []),
        (BOX.format("(5000,0),(6000,999999)"), [("", (2000, 0, 2000, 500))]),
        (BOX.format("nothing"), []),
        ("(a,b) and (1,2,3)", []),
        ("", []),
    ],
)
def test_answers_are_read(text: str, expected: list[tuple[str, tuple[float, ...]]]) -> None:
    found = parse_grounding(text, SIZE)
    assert [region.label for region in found] == [label for label, _ in expected]
    for region, (_, box) in zip(found, expected, strict=True):
        assert region.box == pytest.approx(box)


def test_other_scales() -> None:
    assert parse_grounding("(0.25,0.5)", (400, 200), scale=1) == [Region("", ((100, 100),))]
    with pytest.raises(ValueError, match="above 0"):
        parse_grounding("", (0, 1))
    with pytest.raises(ValueError, match="above 0"):
        parse_grounding("", (1, 1), scale=0)


def test_any_text_is_read_in_little_time() -> None:
    """Pieces of markers and numbers in any order; nothing outside the picture."""
    rng = random.Random(3)
    pieces = [
        "<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "(1,2)", "(", ")", ",",
        "9" * 40,        "<|quad_start|>", "(99999,3)", " ", "name", "\n", "-1", "(1,", "3.5",
    ]  # fmt: skip
    for _ in range(2000):
        for region in parse_grounding("".join(rng.choices(pieces, k=30)), SIZE):
            left, top, right, bottom = region.box
            assert 0 <= left <= right <= 2000
            assert 0 <= top <= bottom <= 500
    assert len(parse_grounding("(1,2)," * 200_000, SIZE)) == 10_000
    assert parse_grounding("<|object_ref_start|>" * 20_000, SIZE) == []
    assert parse_grounding("(1" * 200_000, SIZE) == []


@pytest.fixture(scope="module")
def demo() -> Qwen2VL:
    return Qwen2VL.from_gguf(DEMO_MODEL)


def scaled(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (round(v * side / 1000) for v, side in zip(box, size * 2, strict=True))
    return left, top, right, bottom


def test_things_are_found_where_they_are(demo: Qwen2VL) -> None:
    """20 unseen cards; also with the picture turned, as a camera does."""
    right = 0
    for seed in range(700_000, 700_020):
        case = cases.case("box", seed)
        turn = case.turns[-1]
        assert turn.box is not None
        picture = Image.open(io.BytesIO(case.images[0]))
        phrase = turn.answer.split("<|object_ref_start|>")[1].split("<|object_ref_end|>")[0]
        [region] = demo.ground(case.images[0], phrase)
        found = tuple(map(round, region.box))
        right += cases.iou(found, scaled(turn.box, picture.size)) >= 0.5  # type: ignore[arg-type]
        assert not region.is_point
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = io.BytesIO()
        picture.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
        assert demo.ground(turned.getvalue(), phrase) == [region]
    assert right >= 17


def test_the_command(run: Run, tmp_path: Path) -> None:
    case = cases.case("box", 700_000)
    turn = case.turns[-1]
    assert turn.box is not None
    card, out = tmp_path / "card.png", tmp_path / "found.png"
    card.write_bytes(case.images[0])
    phrase = turn.answer.split("<|object_ref_start|>")[1].split("<|object_ref_end|>")[0]
    code, printed, _ = run("ground", card, phrase, "-o", out, "--json")
    assert code == 0
    [found] = json.loads(printed)
    with Image.open(card) as picture:
        size, before = picture.size, np.asarray(picture.convert("RGB")).astype(int)
    assert found["label"] == phrase
    assert cases.iou(tuple(map(round, found["box"])), scaled(turn.box, size)) > 0.6
    with Image.open(out) as picture:
        changed = np.argwhere(np.abs(np.asarray(picture).astype(int) - before).sum(2) > 0)
    top, left = changed.min(0)
    bottom, right = changed.max(0)
    x0, y0, x1, y1 = found["box"]
    assert top <= y0
    assert bottom == pytest.approx(y1, abs=6)
    assert max(right, x1) - x1 < 80  # the label may be wider
    assert left <= x0 < x1 <= right + 2
    code, printed, _ = run("ground", card, phrase)
    assert (code, printed) == (0, f"{phrase}: " + " ".join(f"{v:.0f}" for v in found["box"]) + "\n")
    code, _, errors = run("ground", card, phrase, "-o", out)
    assert (code, "--force" in errors) == (2, True)
    code, _, errors = run("ground", card, phrase, "--question", "What is {}?")
    assert (code, "not found" in errors) == (1, True)


@pytest.mark.parametrize("size", [(1, 1), (30, 20), (3000, 2000)])
@pytest.mark.parametrize("colour", ["black", "white", "#d55e00"])
def test_drawings_are_seen_on_any_picture(size: tuple[int, int], colour: str) -> None:
    picture = Image.new("RGB", size, colour)
    w, h = size
    regions = [
        ("a long label " * 9, (0.0, 0.0, w, h)),
        ("", (w / 3, h / 3, w / 2, h / 2)),
        ("p", (w, h, w, h)),
    ]
    drawn = draw_regions(picture, regions)
    assert drawn.size == size
    assert picture.getcolors() == [(w * h, picture.getpixel((0, 0)))]  # as it was
    levels = np.asarray(drawn.convert("L")).astype(int)
    assert size == (1, 1) or levels.max() - levels.min() > 60
