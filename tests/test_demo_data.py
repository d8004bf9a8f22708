"""The demo's pictures and questions: their truth must be what was drawn."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from demo import cases, data, questions

SEEDS = range(40)


def shapes(seed: int, width: int = 133, height: int = 97) -> data.Picture:
    rng = random.Random(seed)
    return data.draw_shapes(rng, width, height, data.choose_counted(6))


def text(seed: int) -> data.Picture:
    return data.draw_text(random.Random(seed), 141, 90, data.Level())


@pytest.mark.parametrize("draw", [shapes, text])
def test_same_seed_same_picture(draw: Callable[[int], data.Picture]) -> None:
    first, second = draw(3), draw(3)
    assert first.things == second.things
    assert np.array_equal(first.pixels, second.pixels)
    assert not np.array_equal(first.pixels, draw(4).pixels)


@pytest.mark.parametrize("seed", SEEDS)
def test_shapes_fill_their_boxes_and_do_not_overlap(seed: int) -> None:
    picture = shapes(seed)
    assert set(np.unique(picture.ids)) == set(range(len(picture.things) + 1))
    for k, thing in enumerate(picture.things, 1):
        ys, xs = np.nonzero(picture.ids == k)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(drawn - np.array(thing.box)).max() <= 1.5, (seed, thing, drawn)
        inside = picture.pixels[picture.ids == k].astype(int).mean(0)
        nearest = min(data.COLOURS, key=lambda c: float(np.abs(inside - data.COLOURS[c]).sum()))
        assert nearest == thing.colour


@pytest.mark.parametrize("seed", SEEDS)
def test_text_stands_inside_with_its_characters_in_their_boxes(seed: int) -> None:
    picture = text(seed)
    assert "".join(t.name for t in picture.things) == picture.text
    assert 1 <= len(picture.text) <= data.MAX_TEXT
    background = picture.pixels[4, 4].astype(int)
    for k, thing in enumerate(picture.things, 1):
        x0, y0, x1, y1 = thing.box
        assert x0 >= 0 and y0 >= 0 and x1 <= picture.width and y1 <= picture.height
        ink = np.abs(picture.pixels[picture.ids == k].astype(int) - background).sum(-1)
        assert ink.max() > data.MIN_CONTRAST / 2


def test_resized_boxes_follow_the_picture() -> None:
    picture = shapes(5)
    bigger = picture.resized(140, 112)
    assert bigger.pixels.shape == (112, 140, 3)
    for before, after in zip(picture.things, bigger.things, strict=True):
        small, large = questions.normalized_box(before, picture), questions.normalized_box(after, bigger)
        assert max(abs(a - b) for a, b in zip(small, large, strict=True)) <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_follow_from_the_things(seed: int) -> None:
    rng = random.Random(seed)
    picture = shapes(seed)
    names = [t.name for t in picture.things] + [t.full_name for t in picture.things]
    absent = questions.absent(rng, picture)
    missing = absent.answer.removeprefix("I don't see ").rstrip(".").split(" ", 1)[1]
    assert missing not in names
    counted = questions.count(rng, picture)
    number, name = counted.answer.rstrip(".").split(" ", 1)
    word = name.split()[0] if "shape" in name and name.split()[0] in data.COLOURS else name
    if word.startswith("shape"):
        assert int(number) == len(picture.things)
    else:
        single = next(s for s in (*data.SHAPES, *data.COLOURS) if word in (s, questions.PLURAL.get(s)))
        assert int(number) == sum(single in (t.name, t.colour) for t in picture.things)
    box = questions.box(rng, picture)
    assert box is None or cases.parse_box(box.answer) == box.box


@pytest.mark.parametrize("seed", SEEDS)
def test_two_pictures_differ_in_one_thing(seed: int) -> None:
    rng = random.Random(seed)
    first, second = data.two_pictures(rng, ((90, 100), (120, 84)), 2)
    a, b = (Counter(t.full_name for t in p.things) for p in (first, second))
    assert sum((a - b).values()) == sum((b - a).values()) == 1
    mine, yours = next(iter(a - b)), next(iter(b - a))
    expected = f"The first has {questions.article(mine)}, the second {questions.article(yours)}."
    assert questions.differ(rng, first, second).answer == expected


@pytest.mark.parametrize("task", cases.TASKS)
def test_cases_are_reproducible_and_their_own_answers_are_right(task: str) -> None:
    for seed in range(5):
        case = cases.case(task, seed)
        assert case == cases.case(task, seed)
        assert all(cases.right(t, t.answer) for t in case.turns)
        assert not cases.right(case.turns[-1], "I have no idea.")
        for png in case.images:
            width, height = Image.open(io.BytesIO(png)).size
            assert min(width, height) >= 84 and max(width, height) <= 336


def test_count_cases_are_balanced() -> None:
    numbers = Counter(cases.case("count", seed).turns[0].answer[0] for seed in range(25))
    assert numbers == dict.fromkeys("12345", 5)


def test_second_and_alone_ask_the_same() -> None:
    for seed in range(10):
        second, alone = cases.case("second", seed), cases.case("alone", seed)
        assert second.images == alone.images and second.turns[-1:] == alone.turns


def test_a_list_is_right_in_any_order_and_a_box_from_half_overlap() -> None:
    listed = questions.Turn("what", "What?", "A red circle and an orange star.")
    assert cases.right(listed, "An orange star and a red circle.")
    assert not cases.right(listed, "An orange star and a blue circle.")
    boxed = questions.Turn("box", "Where?", "(100,100),(300,300)", (100, 100, 300, 300))
    assert cases.right(boxed, "(100,100),(300,201)")
    assert not cases.right(boxed, "(100,100),(300,199)")
