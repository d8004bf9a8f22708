"""Draws pictures with ground truth.

Everything follows from a seed: shapes, colours, Pillow's own font; no file is read. A picture is a light,
grey or dark card with a thin frame: the vision tower has relative positions only, so that without anything at
the border an empty card looks the same everywhere.
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
            Thing(t.name, t.colour, (t.box[0] * sx, t.box[1] * sy, t.box[2] * sx, t.box[3] * sy))
            for t in self.things
        )
        size = (width, height)
        pixels = np.asarray(Image.fromarray(self.pixels).resize(size, Image.Resampling.BICUBIC))
        ids = np.asarray(Image.fromarray(self.ids).resize(size, Image.Resampling.NEAREST))
        return Picture(pixels, ids, things, self.text)


@dataclass(frozen=True)
class Level:
    """How hard the pictures are."""

    text_length: tuple[int, int] = (2, MAX_TEXT)
    max_things: int = 6


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
    (
        (1.0 if k % 2 == 0 else 0.42) * np.sin(np.pi * k / 5),
        -(1.0 if k % 2 == 0 else 0.42) * np.cos(np.pi * k / 5),
    )
    for k in range(10)
]
_CROSS = [
    (-1, -3),
    (1, -3),
    (1, -1),
    (3, -1),
    (3, 1),
    (1, 1),
    (1, 3),
    (-1, 3),
    (-1, 1),
    (-3, 1),
    (-3, -1),
    (-1, -1),
]
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
        raise RuntimeError(
            "the demo's pictures need Pillow >= 10.1 with FreeType: its default font must be scalable"
        )
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
            wanted += [
                (rng.choice((other_colour, rng.choice(rest))), rng.choice(SHAPES)) for _ in range(others)
            ]
        else:
            shape = rng.choice(SHAPES)
            wanted = [(rng.choice(colours), shape) for _ in range(count)]
            left = [s for s in SHAPES if s != shape]
            other_shape = rng.choice(left)
            wanted += [
                (rng.choice(colours), rng.choice((other_shape, rng.choice(left)))) for _ in range(others)
            ]
        rng.shuffle(wanted)
        return wanted

    return choose


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
