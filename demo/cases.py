"""Unseen pictures and clips with one question each (or two in a row), and what counts as a right answer."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from demo import clips, data, forms, questions
from demo.clips import Clip
from demo.data import Array, Picture
from demo.questions import Turn
from qwen2vl_q.demo import cards

TASKS = (
    "what",
    "attribute",
    "read",
    "count",
    "box",
    "present",
    "absent",
    "which",
    "differ",
    "chat",
    "second",
    "alone",
    "point",
    "form",
    "field",
    "move",
    "order",
    "bounce",
)
MIN_IOU = 0.5


@dataclass(frozen=True)
class Case:
    """The last turn is the one that is scored; those before it are asked first, in the same conversation."""

    task: str
    images: tuple[bytes, ...]  # PNG; of a clip its frames
    turns: tuple[Turn, ...]

    @property
    def is_clip(self) -> bool:
        return self.task in ("move", "order", "bounce")


def size(rng: random.Random) -> tuple[int, int]:
    """Width and height: 84-224, odd ones too; one side in ten up to 336."""
    width, height = (rng.randint(84, 336 if rng.random() < 0.1 else 224) for _ in range(2))
    return width, height


def png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _few(rng: random.Random) -> Picture:
    return data.draw_shapes(rng, *size(rng), data.choose_few(1, 3))


def _counted(rng: random.Random) -> Picture:
    return data.draw_shapes(rng, *size(rng), data.choose_counted(6))


def _text(rng: random.Random) -> Picture:
    return data.draw_text(rng, *size(rng), data.Level())


def _form(rng: random.Random) -> Picture:
    """160-252 pixels wide, one in ten up to 336."""
    return forms.draw_form(rng, rng.randint(160, 336 if rng.random() < 0.1 else 252), rng.randint(84, 224))


def _clip(rng: random.Random, task: str, seed: int) -> Clip:
    """Each number of bounces as often."""
    width, height = rng.randint(*clips.SIDES), rng.randint(*clips.SIDES)
    if task == "bounce":
        return clips.draw_bounce(rng, width, height, seed % (clips.MOST_BOUNCES + 1))
    draw = clips.draw_move if task == "move" else clips.draw_order
    return draw(rng, width, height, rng.choice(clips.MOVE_FRAMES))


def _until(
    rng: random.Random,
    draw: Callable[[random.Random], Picture],
    ask: Callable[[random.Random, Picture], Turn | None],
    accept: Callable[[Turn], bool] = lambda _: True,
) -> tuple[Picture, Turn]:
    while True:
        picture = draw(rng)
        turn = ask(rng, picture)
        if turn is not None and accept(turn):
            return picture, turn


def _attribute(rng: random.Random, picture: Picture) -> Turn | None:
    return rng.choice((questions.colour, questions.shape))(rng, picture)


def case(task: str, seed: int) -> Case:
    """The `seed`-th case of a task. "alone" asks, first, what "second" asks after another question."""
    rng = random.Random(f"evaluate/{'second' if task == 'alone' else task}/{seed}")
    any_shapes = rng.choice((_few, _counted))
    if task in ("move", "order", "bounce"):
        clip = _clip(rng, task, seed)
        return Case(task, tuple(png(frame) for frame in clip.frames), (questions.ask_clip(rng, clip),))
    if task in ("form", "field"):
        picture = _form(rng)
        turn = (questions.form if task == "form" else questions.field)(rng, picture)
        return Case(task, (png(picture.pixels),), (turn,))
    if task == "chat":
        return Case(task, (), (questions.chat(rng, pictures=False),))
    if task in ("which", "differ"):
        pair = data.two_pictures(rng, (size(rng), size(rng)), 2)
        turn = (questions.which if task == "which" else questions.differ)(rng, *pair)
        return Case(task, tuple(png(p.pixels) for p in pair), (turn,))
    if task in ("second", "alone"):
        picture = (_text if rng.random() < 0.3 else any_shapes)(rng)
        turns = questions.ask(rng, picture, 2)
        return Case(task, (png(picture.pixels),), tuple(turns[-1:] if task == "alone" else turns))
    if task == "count":
        wanted = str(1 + seed % 5)
        picture, turn = _until(rng, _counted, questions.count, lambda t: t.answer[0] == wanted)
    elif task == "read":
        picture, turn = _until(rng, _text, questions.read)
    elif task == "absent":
        picture, turn = _until(rng, any_shapes if rng.random() < 0.9 else _text, questions.absent)
    else:
        asks = {
            "what": questions.what,
            "attribute": _attribute,
            "box": questions.box,
            "point": questions.point,
            "present": questions.present,
        }
        picture, turn = _until(rng, _few if task == "what" else any_shapes, asks[task])
    return Case(task, (png(picture.pixels),), (turn,))


def parse_box(text: str) -> tuple[int, int, int, int] | None:
    found = re.search(r"\((\d+),(\d+)\),\((\d+),(\d+)\)", text)
    if found is None:
        return None
    x0, y0, x1, y1 = (int(v) for v in found.groups())
    return x0, y0, x1, y1


def parse_point(text: str) -> tuple[int, int] | None:
    found = re.search(r"<\|box_start\|>\((\d+),(\d+)\)<\|box_end\|>$", text)
    return None if found is None else (int(found[1]), int(found[2]))


def on_the_thing(turn: Turn, answer: str) -> bool:
    """Whether an answer names the thing with one point, and the thing's shape covers that."""
    found = parse_point(answer)
    label = turn.answer.partition("<|box_start|>")[0]
    if found is None or turn.box is None or label != answer.partition("<|box_start|>")[0]:
        return False
    x0, y0, x1, y1 = turn.box
    shape = label.removesuffix("<|object_ref_end|>").split()[-1]
    return cards.covers(shape, (found[0] - x0) / (x1 - x0), (found[1] - y0) / (y1 - y0))


def read_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, width) * max(0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return both / (areas - both) if areas > both else 0.0


def right(turn: Turn, answer: str) -> bool:
    """Exact, but for the order of a list of things, boxes (IoU >= 0.5), points (on the thing) and JSON."""
    answer = answer.strip().removesuffix("<|im_end|>").strip()
    if turn.task == "point":
        return on_the_thing(turn, answer)
    if turn.task == "form":
        return read_json(answer) == read_json(turn.answer)
    if turn.box is not None:
        found = parse_box(answer)
        return found is not None and iou(found, turn.box) >= MIN_IOU
    if turn.task == "what":

        def things(sentence: str) -> list[str]:
            return sorted(re.split(r", | and ", sentence.lower().rstrip(".")))

        return things(answer) == things(turn.answer) if '"' not in turn.answer else answer == turn.answer
    return answer == turn.answer
