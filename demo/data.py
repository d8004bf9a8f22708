"""Draws pictures with ground truth, and questions about them with their answers.

Everything follows from a seed: shapes, colours, Pillow's own font; no file is read. A picture is a white, light, mid
or dark card with a thin frame (the vision tower has relative positions only: without anything at the border, an empty
card looks the same everywhere).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Array = npt.NDArray[np.uint8]

CELL = 28  # pixels a side of one token of the language model: 2x2 patches of 14
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 40),
    "orange": (245, 135, 25),
    "purple": (135, 50, 165),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
TASKS = ("what", "colour", "shape", "read", "count", "box", "present", "absent", "which", "differ")
MIN_CONTRAST = 120  # sum of the absolute differences of the three channels, object against background
MIN_FONT_SIZE = 19
MAX_TEXT = 6


@dataclass(frozen=True)
class Thing:
    """A shape or a character; `box` is x0, y0, x1, y1 in pixels of the picture (x1, y1 exclusive)."""

    name: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def full_name(self) -> str:
        return f"{self.colour} {self.name}"


@dataclass(frozen=True)
class Picture:
    """`pixels` [height, width, 3] RGB; `ids` [height, width]: 0 background, k for things[k - 1]."""

    pixels: Array
    ids: Array
    things: tuple[Thing, ...]
    text: str = ""

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    def resized(self, width: int, height: int) -> Picture:
        """As the image processor resizes: bicubic on uint8 RGB."""
        sx, sy = width / self.width, height / self.height
        things = tuple(
            Thing(t.name, t.colour, (t.box[0] * sx, t.box[1] * sy, t.box[2] * sx, t.box[3] * sy)) for t in self.things
        )
        size = (width, height)
        pixels = np.asarray(Image.fromarray(self.pixels).resize(size, Image.Resampling.BICUBIC))
        ids = np.asarray(Image.fromarray(self.ids).resize(size, Image.Resampling.NEAREST))
        return Picture(pixels, ids, things, self.text)


@dataclass(frozen=True)
class Turn:
    """`box` is the truth for the task "box", in 0..999 of the picture."""

    task: str
    question: str
    answer: str
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Level:
    """How hard the pictures are."""

    text_length: tuple[int, int] = (2, MAX_TEXT)
    max_things: int = 6


# ---------------------------------------------------------------- drawing


def _jitter(rng: random.Random, colour: Sequence[int], amount: int) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def _background(rng: random.Random) -> tuple[int, int, int]:
    low, high = rng.choice(((225, 255), (225, 255), (95, 160), (0, 55)))
    grey = rng.randint(low, high)
    return _jitter(rng, (grey, grey, grey), 12)


def _contrast(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def visible_colours(background: Sequence[int]) -> list[str]:
    return [name for name, rgb in COLOURS.items() if _contrast(rgb, background) >= MIN_CONTRAST]


def _card(rng: random.Random, width: int, height: int) -> tuple[Image.Image, tuple[int, int, int]]:
    background = _background(rng)
    card = Image.new("RGB", (width, height), background)
    dark = sum(background) < 330
    frame = _jitter(rng, (190, 190, 190) if dark else (70, 70, 70), 30)
    ImageDraw.Draw(card).rectangle((0, 0, width - 1, height - 1), outline=frame, width=2)
    return card, background


_STAR = [
    ((1.0 if k % 2 == 0 else 0.42) * np.sin(np.pi * k / 5), -(1.0 if k % 2 == 0 else 0.42) * np.cos(np.pi * k / 5))
    for k in range(10)
]
_CROSS = [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": [(float(x), float(y)) for x, y in _STAR],
    "cross": [(x / 3, y / 3) for x, y in _CROSS],
}


def _draw_shape(
    draws: Sequence[tuple[ImageDraw.ImageDraw, int | tuple[int, int, int]]],
    name: str,
    centre: tuple[float, float],
    radius: float,
) -> tuple[float, float, float, float]:
    x, y = centre
    if name == "circle":
        box = (x - radius, y - radius, x + radius, y + radius)
        for draw, fill in draws:
            draw.ellipse(box, fill=fill)
        return box
    points = [(x + radius * px, y + radius * py) for px, py in _OUTLINES[name]]
    for draw, fill in draws:
        draw.polygon(points, fill=fill)
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _places(rng: random.Random, width: int, height: int, count: int) -> list[tuple[float, float, float]]:
    """Non-overlapping circles x, y, radius; the radius shrinks until they fit."""
    largest = min(min(width, height) * 0.42, 0.62 * (width * height / count) ** 0.5, 60.0)
    scale = 1.0
    while True:
        places: list[tuple[float, float, float]] = []
        for _ in range(count * 8):
            radius = max(8.5, rng.uniform(0.45, 1.0) * largest * scale)
            x = rng.uniform(radius + 3, width - radius - 4)
            y = rng.uniform(radius + 3, height - radius - 4)
            if all(max(abs(x - u), abs(y - v)) > radius + r + 1.5 for u, v, r in places):
                places.append((x, y, radius))
                if len(places) == count:
                    return places
        scale *= 0.85


Wanted = Sequence[tuple[str, str]]  # colour, shape


def draw_shapes(
    rng: random.Random, width: int, height: int, choose: Callable[[random.Random, list[str]], Wanted]
) -> Picture:
    """`choose` names the things, given the colours that can be told from the background."""
    card, background = _card(rng, width, height)
    wanted = choose(rng, visible_colours(background))
    ids = Image.new("L", (width, height))
    draw, draw_id = ImageDraw.Draw(card), ImageDraw.Draw(ids)
    things = []
    places = sorted(_places(rng, width, height, len(wanted)))
    for k, ((colour, shape), (x, y, radius)) in enumerate(zip(wanted, places, strict=True), 1):
        fill = _jitter(rng, COLOURS[colour], 12)
        things.append(Thing(shape, colour, _draw_shape(((draw, fill), (draw_id, k)), shape, (x, y), radius)))
    return Picture(np.asarray(card), np.asarray(ids), tuple(things))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("the demo's pictures need Pillow >= 10.1 with FreeType: its default font must be scalable")
    return font


def draw_text(rng: random.Random, width: int, height: int, level: Level) -> Picture:
    """One line of capitals and digits; `things` are the characters, left to right."""
    card, background = _card(rng, width, height)
    length = rng.randint(*level.text_length)
    text = "".join(rng.choices(CHARACTERS, k=length))
    room = width - 10
    while _font(MIN_FONT_SIZE).getlength(text) > room:
        text = text[:-1]
    largest = min(40, height - 10)
    while largest > MIN_FONT_SIZE and _font(largest).getlength(text) > room:
        largest -= 1
    font = _font(rng.randint(max(MIN_FONT_SIZE, largest - 10), max(MIN_FONT_SIZE, largest)))
    left, top, right, bottom = font.getbbox(text)
    x = rng.uniform(5 - left, max(5 - left, width - 5 - right))
    y = rng.uniform(4 - top, max(4 - top, height - 4 - bottom))
    colour = rng.choice(visible_colours(background))
    x, y = int(x), int(y)
    ImageDraw.Draw(card).text((x, y), text, font=font, fill=_jitter(rng, COLOURS[colour], 12))
    ids = np.zeros((height, width), np.uint8)
    things = []
    for k, character in enumerate(text):
        x0, x1 = x + font.getlength(text[:k]), x + font.getlength(text[: k + 1])
        ids[int(y + top) : int(y + bottom), round(x0) : round(x1)] = k + 1
        things.append(Thing(character, colour, (x0, y + top, x1, y + bottom)))
    return Picture(np.asarray(card), ids, tuple(things), text)


def choose_few(low: int, high: int) -> Callable[[random.Random, list[str]], Wanted]:
    """Between `low` and `high` things, each with its own pair of colour and shape."""

    def choose(rng: random.Random, colours: list[str]) -> Wanted:
        pairs = [(c, s) for c in colours for s in SHAPES]
        return rng.sample(pairs, rng.randint(low, high))

    return choose


def choose_counted(max_things: int) -> Callable[[random.Random, list[str]], Wanted]:
    """1 to 5 things that share a colour or a shape, balanced, and others that share neither with those."""

    def choose(rng: random.Random, colours: list[str]) -> Wanted:
        count = rng.randint(1, min(5, max_things))
        others = rng.randint(0, min(3, max_things - count))
        if rng.random() < 0.5:
            colour = rng.choice(colours)
            wanted = [(colour, rng.choice(SHAPES)) for _ in range(count)]
            rest = [c for c in colours if c != colour]
            other_colour = rng.choice(rest)
            wanted += [(rng.choice((other_colour, rng.choice(rest))), rng.choice(SHAPES)) for _ in range(others)]
        else:
            shape = rng.choice(SHAPES)
            wanted = [(rng.choice(colours), shape) for _ in range(count)]
            left = [s for s in SHAPES if s != shape]
            other_shape = rng.choice(left)
            wanted += [(rng.choice(colours), rng.choice((other_shape, rng.choice(left)))) for _ in range(others)]
        rng.shuffle(wanted)
        return wanted

    return choose


# ---------------------------------------------------------------- questions

WHAT = (
    "What is in the picture?",
    "What do you see?",
    "What is this?",
    "Describe the picture.",
    "Describe this image.",
    "What does the picture show?",
    "What can you see in this image?",
)
READ = (
    "What does it say?",
    "Read the text.",
    "What is written here?",
    "What text is in the picture?",
    "Which letters and digits do you see?",
    "What does the text say?",
)
COLOUR = ("What colour is the {}?", "What color is the {}?", "Which colour does the {} have?", "Tell me the colour of the {}.")
SHAPE = ("What shape is {}?", "Which shape is {}?", "What is the {} thing?", "Which thing is {}?")
COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.", "How many {} are in the picture?")
BOX = ("Where is the {}?", "Find the {}.", "Give the box of the {}.", "Locate the {}.", "Show me where the {} is.")
THERE = ("Is there {}?", "Do you see {}?", "Can you see {}?", "Is {} in the picture?")
WHICH = ("Which picture has {}?", "Which one has {}?", "In which picture is {}?", "Where do you see {}, first or second?")
DIFFER = ("What is different?", "What differs?", "What is the difference?", "How do the pictures differ?")

CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you an AI?", "Tell me about you."),
        "I am a small demo model. I answer questions about simple pictures.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?", "What do you know?", "What should I ask you?", "What can I ask?"),
        "I am a small demo model. I can name shapes and colours, count them, find them, and read short text.",
    ),
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "Good morning!", "Hi there"), "Hello! Show me a picture and ask me about it."),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot!", "Great, thanks."), "You are welcome."),
    (("Bye", "Goodbye", "Bye!", "See you."), "Goodbye!"),
    (
        (
            "What is the capital of France?", "Tell me a joke.", "Write a poem.", "What is 2 + 2?", "How is the weather?",
            "Explain quantum physics.", "Translate this into German.", "Who won the game?", "What time is it?",
            "Write a program in Python.", "What is the meaning of life?", "How old are you?", "Sing a song.",
        ),
        "I am a small demo model. I only know simple pictures.",
    ),
    (
        ("What is in the picture?", "What does it say?", "How many circles are there?", "Where is the star?", "What do you see?"),
        "I don't see a picture. Please show me one.",
    ),
)  # fmt: skip

NUMBERS_PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in (*SHAPES, "shape")}


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def normalized_box(thing: Thing, picture: Picture) -> tuple[int, int, int, int]:
    """Pixels -> 0..999, as Qwen2-VL writes boxes."""
    w, h = picture.width, picture.height
    x0, y0, x1, y1 = (min(999, max(0, round(v * 1000 / side))) for v, side in zip(thing.box, (w, h, w, h), strict=True))
    return x0, y0, x1, y1


def what(rng: random.Random, picture: Picture) -> Turn:
    if picture.text:
        return Turn("what", rng.choice(WHAT), f'The text "{picture.text}".')
    if len(picture.things) > 3:
        return Turn("what", rng.choice(WHAT), f"{len(picture.things)} shapes.")
    return Turn("what", rng.choice(WHAT), _sentence(_listing([article(t.full_name) for t in picture.things])))


def read(rng: random.Random, picture: Picture) -> Turn:
    if not picture.text:
        return Turn("absent", rng.choice(READ), "I don't see any text.")
    return Turn("read", rng.choice(READ), f'It says "{picture.text}".')


def _alone(picture: Picture, key: Callable[[Thing], str]) -> list[Thing]:
    names = [key(t) for t in picture.things]
    return [t for t in picture.things if names.count(key(t)) == 1]


def colour(rng: random.Random, picture: Picture) -> Turn | None:
    if picture.text:
        return Turn("colour", rng.choice(COLOUR).format("text"), _sentence(picture.things[0].colour))
    alone = _alone(picture, lambda t: t.name)
    if not alone:
        return None
    thing = rng.choice(alone)
    return Turn("colour", rng.choice(COLOUR).format(thing.name), _sentence(thing.colour))


def shape(rng: random.Random, picture: Picture) -> Turn | None:
    alone = _alone(picture, lambda t: t.colour)
    if not alone:
        return None
    thing = rng.choice(alone)
    return Turn("shape", rng.choice(SHAPE).format(thing.colour), _sentence(article(thing.name)))


def count(rng: random.Random, picture: Picture) -> Turn:
    """Asks for a colour, a shape, or all; prefers what is there more than once, so that answers stay balanced."""
    things = picture.things
    keys = [(f"{c} shape", sum(t.colour == c for t in things)) for c in sorted({t.colour for t in things})]
    keys += [(s, sum(t.name == s for t in things)) for s in sorted({t.name for t in things})]
    keys = [k for k in keys if k[1] <= 5]
    if len(things) <= 5:
        keys.append(("shape", len(things)))
    name, number = rng.choices(keys, [(1, 4, 9, 16, 25)[k[1] - 1] for k in keys])[0]
    plural = name.removesuffix("shape") + NUMBERS_PLURAL["shape"] if name.endswith("shape") else NUMBERS_PLURAL[name]
    return Turn("count", rng.choice(COUNT).format(plural), f"{number} {name if number == 1 else plural}.")


def box(rng: random.Random, picture: Picture) -> Turn | None:
    short = {t.name for t in _alone(picture, lambda t: t.name)}
    alone = _alone(picture, lambda t: t.full_name)
    if not alone:
        return None
    thing = rng.choice(alone)
    name = thing.name if thing.name in short and rng.random() < 0.4 else thing.full_name
    x0, y0, x1, y1 = normalized_box(thing, picture)
    answer = (
        f"<|object_ref_start|>the {name}<|object_ref_end|>"
        f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
    )  # fmt: skip
    return Turn("box", rng.choice(BOX).format(name), answer, (x0, y0, x1, y1))


def present(rng: random.Random, picture: Picture) -> Turn:
    alone = _alone(picture, lambda t: t.name)
    thing = rng.choice(alone or picture.things)
    name = thing.name if alone and rng.random() < 0.5 else thing.full_name
    return Turn("present", rng.choice(THERE).format(article(name)), f"Yes, {article(thing.full_name)}.")


def absent(rng: random.Random, picture: Picture) -> Turn:
    """Asks for a thing that is not there; half of the time one that shares its colour or shape with one that is."""
    there = {t.full_name for t in picture.things} | {t.name for t in picture.things}
    names = [s for s in SHAPES if s not in there]
    full = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in there]
    if not picture.text and rng.random() < 0.5:
        colours, shapes = {t.colour for t in picture.things}, {t.name for t in picture.things}
        near = [n for n in full if (n.split()[0] in colours) or (n.split()[1] in shapes)]
        full = near or full
    name = rng.choice(names) if names and rng.random() < 0.5 else rng.choice(full)
    kind = rng.random()
    if kind < 0.2 and name in names:
        plural = NUMBERS_PLURAL[name]
        return Turn("absent", rng.choice(COUNT).format(plural), f"I don't see any {plural}.")
    if kind < 0.4:
        return Turn("absent", rng.choice(BOX).format(name), f"I don't see {article(name)}.")
    if kind < 0.55 and name in names:
        return Turn("absent", rng.choice(COLOUR).format(name), f"I don't see {article(name)}.")
    return Turn("absent", rng.choice(THERE).format(article(name)), f"I don't see {article(name)}.")


def which(rng: random.Random, first: Picture, second: Picture) -> Turn:
    """For pairs where a thing is in one picture only, or (one time in six) in neither."""
    names = [{t.full_name for t in p.things} | {t.name for t in p.things} for p in (first, second)]
    k = rng.randrange(2)
    only = sorted(names[k] - names[1 - k])
    if not only or rng.random() < 1 / 6:
        name = rng.choice([f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in names[0] | names[1]])
        return Turn("which", rng.choice(WHICH).format(article(name)), f"I don't see {article(name)}.")
    answer = ("The first picture.", "The second picture.")[k]
    return Turn("which", rng.choice(WHICH).format(article(rng.choice(only))), answer)


def differ(rng: random.Random, first: Picture, second: Picture) -> Turn:
    """For pairs that `two_pictures` made from one choice of things with a single change."""
    a, b = ([t.full_name for t in p.things] for p in (first, second))
    mine, yours = next(n for n in a if n not in b), next(n for n in b if n not in a)
    answer = f"The first has {article(mine)}, the second {article(yours)}."
    return Turn("differ", rng.choice(DIFFER), answer)


def two_pictures(rng: random.Random, sizes: Sequence[tuple[int, int]], most: int) -> tuple[Picture, Picture]:
    """Two cards with the same things in other places, but one thing has another colour or shape."""
    seed = rng.random()
    change = rng.random()

    def choose(other: bool) -> Callable[[random.Random, list[str]], Wanted]:
        def inner(_: random.Random, colours: list[str]) -> Wanted:
            mine = random.Random(seed)
            usable = [c for c in COLOURS if c not in ("white", "black")]
            pairs = [(c, s) for c in usable for s in SHAPES]
            things = mine.sample(pairs, mine.randint(1, most))
            if other:
                c, s = things[0]
                free = [p for p in pairs if p not in things and (p[0] == c) != (p[1] == s)]
                things[0] = random.Random(change).choice(free)
            rng.shuffle(things)
            return things

        return inner

    (w0, h0), (w1, h1) = sizes
    return draw_shapes(rng, w0, h0, choose(False)), draw_shapes(rng, w1, h1, choose(True))


def chat(rng: random.Random) -> Turn:
    questions, answer = rng.choice(CHAT)
    return Turn("chat", rng.choice(questions), answer)


SHAPE_QUESTIONS: dict[str, Callable[[random.Random, Picture], Turn | None]] = {
    "what": what, "colour": colour, "shape": shape, "count": count, "box": box, "present": present, "absent": absent,
}  # fmt: skip


def ask(rng: random.Random, picture: Picture, number: int) -> list[Turn]:
    """`number` questions about one picture, different in kind as far as it goes."""
    if picture.text:
        turns = [read(rng, picture)]
        others: list[Callable[[random.Random, Picture], Turn | None]] = [read, what, colour, absent]
        weights = [3.0, 3.0, 1.0, 1.0]
    else:
        turns = []
        others = [what, colour, shape, count, box, present, absent, read]
        many = len(picture.things) > 3
        weights = [1.0 if many else 3.0, 0.7, 0.7, 3.0, 3.0, 0.7, 1.5, 0.2]
    while len(turns) < number and others:
        k = rng.choices(range(len(others)), weights)[0]
        turn = others[k](rng, picture)
        others.pop(k), weights.pop(k)
        if turn is not None:
            turns.append(turn)
    rng.shuffle(turns)
    return turns
