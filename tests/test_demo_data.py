"""The demo's pictures and questions: their truth must be what was drawn."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from demo import cases, clips, data, forms, questions

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


def assert_characters_in_their_boxes(picture: data.Picture) -> None:
    background = picture.pixels[4, 4].astype(int)
    for k, thing in enumerate(picture.things, 1):
        x0, y0, x1, y1 = thing.box
        assert x0 >= 0 and y0 >= 0 and x1 <= picture.width and y1 <= picture.height
        ink = np.abs(picture.pixels[picture.ids == k].astype(int) - background).sum(-1)
        assert ink.max() > data.MIN_CONTRAST / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_text_stands_inside_with_its_characters_in_their_boxes(seed: int) -> None:
    picture = text(seed)
    assert "".join(t.name for t in picture.things) == picture.text
    assert 1 <= len(picture.text) <= data.MAX_TEXT
    assert_characters_in_their_boxes(picture)


def drawn_box(ids: data.Array, k: int) -> tuple[int, int, int, int] | None:
    ys, xs = np.nonzero(ids == k)
    return (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1) if len(xs) else None


def clip(kind: str, seed: int) -> clips.Clip:
    rng = random.Random(seed)
    width, height = rng.randint(*clips.SIDES), rng.randint(*clips.SIDES)
    if kind == "bounce":
        return clips.draw_bounce(rng, width, height, seed % 4)
    return (clips.draw_move if kind == "move" else clips.draw_order)(rng, width, height, 4 + seed % 2 * 2)


@pytest.mark.parametrize("kind", ["move", "order", "bounce"])
@pytest.mark.parametrize("seed", SEEDS)
def test_things_of_a_clip_are_where_it_says(kind: str, seed: int) -> None:
    found = clip(kind, seed)
    count, height, width, _ = found.frames.shape
    assert count % 2 == 0 and found.ids.shape == (count, height, width)
    for k, path in enumerate(found.paths, 1):
        for frame, ids, box in zip(found.frames, found.ids, path, strict=True):
            drawn = drawn_box(ids, k)
            assert (drawn is None) == (box is None)
            if drawn is None or box is None:
                continue
            assert np.abs(np.array(drawn) - box).max() <= 1.5
            inside = frame[ids == k].astype(int).mean(0)
            nearest = min(data.COLOURS, key=lambda c: float(np.abs(inside - data.COLOURS[c]).sum()))
            assert nearest == found.things[k - 1].colour


@pytest.mark.parametrize("seed", SEEDS)
def test_a_thing_moves_where_the_answer_says(seed: int) -> None:
    found = clip("move", seed)
    middles = [
        [(box[0] + box[2], box[1] + box[3]) for box in (drawn_box(ids, k) for ids in found.ids) if box]
        for k in range(1, len(found.things) + 1)
    ]
    for _ in range(5):
        turn = questions.move(random.Random(seed), found)
        if turn.question in questions.MOVES:
            assert sum(m[0] != m[-1] for m in middles) == 1
            continue
        asked = next(k for k, t in enumerate(found.things) if f" {t.name} " in turn.question)
        (x0, y0), (x1, y1) = middles[asked][0], middles[asked][-1]
        way = {"Left.": (-1, 0), "Right.": (1, 0), "Up.": (0, -1), "Down.": (0, 1)}.get(turn.answer, (0, 0))
        assert (np.sign(x1 - x0), np.sign(y1 - y0)) == way
        assert way != (0, 0) or turn.answer == "It does not move."


@pytest.mark.parametrize("seed", SEEDS)
def test_one_thing_follows_the_other(seed: int) -> None:
    found = clip("order", seed)
    there = [[k for k in (1, 2) if (ids == k).any()] for ids in found.ids]
    assert there == sorted(there) and there.count([1]) >= 2 and there.count([2]) >= 2
    assert len(there) == there.count([1]) + there.count([2])
    first, second = (questions.article(t.full_name) for t in found.things)
    assert questions.order(random.Random(1), found).answer == f"First {first}, then {second}."


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bounce_is_a_frame_at_the_edge_where_a_thing_turns(seed: int) -> None:
    found = clip("bounce", seed)
    _, height, width, _ = found.frames.shape
    boxes = [box for box in found.paths[0] if box is not None]
    gaps = [min(x0 - 2, y0 - 2, width - 3 - x1, height - 3 - y1) for x0, y0, x1, y1 in boxes]
    near = [i for i, gap in enumerate(gaps) if gap < 4]
    assert near == list(found.touches)
    assert all(abs(gaps[i]) < 1.5 for i in near)
    ways = [clips.motion(a, b) for a, b in itertools.pairwise(boxes)]
    turns = [i for i in range(1, len(boxes) - 1) if ways[i - 1] != ways[i]]
    assert turns == near
    assert questions.bounce(random.Random(1), found).answer == questions.BOUNCES[len(turns)]


def test_a_resized_clip_keeps_its_truth() -> None:
    found = clip("bounce", 3).resized(336, 308)
    assert found.frames.shape == (8, 308, 336, 3)
    for ids, box in zip(found.ids, found.paths[0], strict=True):
        assert box is not None and np.abs(np.array(drawn_box(ids, 1)) - box).max() <= 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_form_shows_its_fields(seed: int) -> None:
    rng = random.Random(seed)
    picture = forms.draw_form(rng, rng.randint(155, 336), rng.randint(84, 224))
    assert 2 <= len(picture.fields) <= 4
    assert "".join(t.name for t in picture.things) == "".join(k + v for k, v in picture.fields)
    for key, value in picture.fields:
        assert 2 <= len(value) <= 4 and set(value) <= set(forms.FIELDS[key])
    assert_characters_in_their_boxes(picture)
    middles = sorted({(t.box[1] + t.box[3]) / 2 for t in picture.things})
    assert len(middles) == len(picture.fields)
    assert all(b - a >= data.CELL for a, b in itertools.pairwise(middles))
    assert json.loads(questions.form(rng, picture).answer) == dict(picture.fields)
    field = questions.field(rng, picture)
    key = next(k for k, _ in picture.fields if k in field.question)
    assert field.answer == f'It says "{dict(picture.fields)[key]}".'


@pytest.mark.parametrize("seed", SEEDS)
def test_a_point_is_on_the_thing(seed: int) -> None:
    picture = shapes(seed)
    turn = questions.point(random.Random(seed), picture)
    if turn is None:
        return
    x, y = cases.parse_point(turn.answer) or (-1, -1)
    k = int(picture.ids[y * picture.height // 1000, x * picture.width // 1000])
    assert k > 0 and picture.things[k - 1].full_name.endswith(turn.question.partition(" the ")[2].rstrip("."))


def test_a_point_is_right_where_the_shape_covers_it() -> None:
    """Against pixels, at every point of a coarse grid that is not close to an outline."""
    picture = data.draw_shapes(random.Random(2), 200, 200, lambda _, __: [("red", s) for s in data.SHAPES])
    for k, thing in enumerate(picture.things, 1):
        box = questions.normalized_box(thing, picture)
        name = f"<|object_ref_start|>the {thing.name}<|object_ref_end|><|box_start|>"
        turn = questions.Turn("point", "?", f"{name}({box[0]},{box[1]})<|box_end|>", box)
        covered = picture.ids == k
        for x in range(4, 196, 3):
            for y in range(4, 196, 3):
                near = covered[y - 2 : y + 3, x - 2 : x + 3]
                if near.all() or not near.any():
                    said = f"{name}({x * 5 + 2},{y * 5 + 2})<|box_end|>"
                    assert cases.right(turn, said) == bool(near.all()), (thing, x, y)


def test_an_object_is_right_whatever_its_order_and_spaces() -> None:
    turn = questions.Turn("form", "?", '{"NAME": "AB", "QTY": "12"}')
    assert cases.right(turn, '{"QTY":"12","NAME":"AB"}')
    for wrong in ('{"NAME": "AB"}', '{"NAME": "AB", "QTY": 12}', '{"NAME": "AB", "QTY": "12"', "AB"):
        assert not cases.right(turn, wrong)


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
            assert case.is_clip == (len(case.images) >= 4)


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
