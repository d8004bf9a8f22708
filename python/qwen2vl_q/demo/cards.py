"""Cards: what the packaged demo model knows. Coloured shapes on an even ground, in a thin frame.

Everything follows from a seed; no file is read. The frame is there because the vision tower has relative
positions only: without anything at the border an empty card looks the same everywhere.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw

RGB: TypeAlias = "tuple[int, int, int]"
Wanted: TypeAlias = "Sequence[tuple[str, str]]"  # colour, shape
Box: TypeAlias = "tuple[float, float, float, float]"  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
COLOURS: dict[str, RGB] = {
    "red": (215, 35, 35),
    "green": (40, 155, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 40),
    "orange": (245, 135, 25),
    "purple": (135, 50, 165),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
MIN_CONTRAST = 120  # sum of the absolute differences of the three channels, object against background

_STAR = [
    (radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5))
    for k, radius in enumerate((1.0, 0.42) * 5)
]
_CROSS = [
    (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1),
    (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1),
]  # fmt: skip
_OUTLINES: dict[str, list[tuple[float, float]]] = {  # of radius 1
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "star": _STAR,
    "cross": [(x / 3, y / 3) for x, y in _CROSS],
}


@dataclass(frozen=True)
class Thing:
    """A shape, or a character of a text."""

    name: str
    colour: str
    box: Box

    @property
    def full_name(self) -> str:
        return f"{self.colour} {self.name}"


def jitter(rng: random.Random, colour: RGB, amount: int) -> RGB:
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def visible_colours(background: RGB) -> list[str]:
    def contrast(colour: RGB) -> int:
        return sum(abs(x - y) for x, y in zip(colour, background, strict=True))

    return [name for name, rgb in COLOURS.items() if contrast(rgb) >= MIN_CONTRAST]


def blank(rng: random.Random, width: int, height: int) -> tuple[Image.Image, RGB]:
    """A light, grey or dark card with its frame, and its ground's colour."""
    low, high = rng.choice(((225, 255), (225, 255), (95, 160), (0, 55)))
    grey = rng.randint(low, high)
    background = jitter(rng, (grey, grey, grey), 12)
    card = Image.new("RGB", (width, height), background)
    dark = sum(background) < 330
    frame = jitter(rng, (190, 190, 190) if dark else (70, 70, 70), 30)
    ImageDraw.Draw(card).rectangle((0, 0, width - 1, height - 1), outline=frame, width=2)
    return card, background


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


def extent(name: str, radius: float) -> Box:
    """The box around a shape whose middle is at 0, 0."""
    if name == "circle":
        return -radius, -radius, radius, radius
    xs, ys = zip(*((px * radius, py * radius) for px, py in _OUTLINES[name]), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def draw_shape(
    draws: Sequence[tuple[ImageDraw.ImageDraw, int | RGB]], name: str, x: float, y: float, radius: float
) -> Box:
    """On each of the drawings in its colour. -> the shape's box"""
    x0, y0, x1, y1 = extent(name, radius)
    box = x + x0, y + y0, x + x1, y + y1
    for draw, fill in draws:
        if name == "circle":
            draw.ellipse(box, fill=fill)
        else:
            draw.polygon([(x + radius * px, y + radius * py) for px, py in _OUTLINES[name]], fill=fill)
    return box


def draw_shapes(
    rng: random.Random, width: int, height: int, choose: Callable[[random.Random, list[str]], Wanted]
) -> tuple[Image.Image, Image.Image, tuple[Thing, ...]]:
    """A card, the number of the thing at each of its pixels (mode L, 0: none), and the things, left to right.

    `choose` names the things, given the colours that can be told from the background.
    """
    card, background = blank(rng, width, height)
    wanted = choose(rng, visible_colours(background))
    ids = Image.new("L", (width, height))
    draw, draw_id = ImageDraw.Draw(card), ImageDraw.Draw(ids)
    places = sorted(_places(rng, width, height, len(wanted)))
    things = []
    for k, ((colour, shape), place) in enumerate(zip(wanted, places, strict=True), 1):
        fill = jitter(rng, COLOURS[colour], 12)
        things.append(Thing(shape, colour, draw_shape(((draw, fill), (draw_id, k)), shape, *place)))
    return card, ids, tuple(things)


def choose_few(low: int, high: int) -> Callable[[random.Random, list[str]], Wanted]:
    """Between `low` and `high` things, each with its own pair of colour and shape."""

    def choose(rng: random.Random, colours: list[str]) -> Wanted:
        pairs = [(c, s) for c in colours for s in SHAPES]
        return rng.sample(pairs, rng.randint(low, high))

    return choose


def example(seed: int) -> tuple[Image.Image, tuple[Thing, ...]]:
    """The `seed`-th card of the demo command: two or three things of different shapes, left to right."""
    rng = random.Random(f"example/{seed}")
    width, height, count = rng.randint(140, 224), rng.randint(140, 224), rng.randint(2, 3)

    def choose(rng: random.Random, colours: list[str]) -> Wanted:
        return list(zip(rng.sample(colours, count), rng.sample(SHAPES, count), strict=True))

    card, _, things = draw_shapes(rng, width, height, choose)
    return card, things


def covers(name: str, u: float, v: float) -> bool:
    """Whether a shape covers a point of its box, 0..1 from the left and from the top."""
    x0, y0, x1, y1 = extent(name, 1)
    x, y = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
    if name == "circle":
        return x * x + y * y <= 1
    inside = False
    points = _OUTLINES[name]
    for (xa, ya), (xb, yb) in zip(points, [*points[1:], points[0]], strict=True):
        if (ya > y) != (yb > y) and x < xa + (y - ya) * (xb - xa) / (yb - ya):
            inside = not inside
    return inside


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
