"""Draws pictures with ground truth, all from a seed: cards of shapes (`qwen2vl_q.demo.cards`), or of one
line of text in Pillow's own font."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from qwen2vl_q.demo import cards
from qwen2vl_q.demo.cards import COLOURS as COLOURS
from qwen2vl_q.demo.cards import MIN_CONTRAST as MIN_CONTRAST
from qwen2vl_q.demo.cards import SHAPES as SHAPES
from qwen2vl_q.demo.cards import Thing as Thing
from qwen2vl_q.demo.cards import Wanted, jitter, visible_colours
from qwen2vl_q.demo.cards import choose_few as choose_few

Array = npt.NDArray[np.uint8]

CELL = 28  # pixels a side of one token of the language model: 2x2 patches of 14
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MIN_FONT_SIZE = 19
MAX_TEXT = 6


@dataclass(frozen=True)
class Picture:
    """`pixels` [height, width, 3] RGB; `ids` [height, width]: 0 background, k for things[k - 1]."""

    pixels: Array
    ids: Array
    things: tuple[Thing, ...]
    text: str = ""
    fields: tuple[tuple[str, str], ...] = ()  # of a form

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
        return Picture(pixels, ids, things, self.text, self.fields)


@dataclass(frozen=True)
class Level:
    """How hard the pictures are."""

    text_length: tuple[int, int] = (2, MAX_TEXT)
    max_things: int = 6


def draw_shapes(
    rng: random.Random, width: int, height: int, choose: Callable[[random.Random, list[str]], Wanted]
) -> Picture:
    """`choose` names the things, given the colours that can be told from the background."""
    card, ids, things = cards.draw_shapes(rng, width, height, choose)
    return Picture(np.asarray(card), np.asarray(ids), things)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "the demo's pictures need Pillow >= 10.1 with FreeType: its default font must be scalable"
        )
    return font


def draw_text(rng: random.Random, width: int, height: int, level: Level) -> Picture:
    """One line of capitals and digits; `things` are the characters, left to right."""
    card, background = cards.blank(rng, width, height)
    length = rng.randint(*level.text_length)
    text = "".join(rng.choices(CHARACTERS, k=length))
    room = width - 10
    while font(MIN_FONT_SIZE).getlength(text) > room:
        text = text[:-1]
    largest = min(40, height - 10)
    while largest > MIN_FONT_SIZE and font(largest).getlength(text) > room:
        largest -= 1
    face = font(rng.randint(max(MIN_FONT_SIZE, largest - 10), max(MIN_FONT_SIZE, largest)))
    left, top, right, bottom = face.getbbox(text)
    x = rng.uniform(5 - left, max(5 - left, width - 5 - right))
    y = rng.uniform(4 - top, max(4 - top, height - 4 - bottom))
    colour = rng.choice(visible_colours(background))
    x, y = int(x), int(y)
    ImageDraw.Draw(card).text((x, y), text, font=face, fill=jitter(rng, COLOURS[colour], 12))
    ids = np.zeros((height, width), np.uint8)
    things = []
    for k, character in enumerate(text):
        x0, x1 = x + face.getlength(text[:k]), x + face.getlength(text[: k + 1])
        ids[int(y + top) : int(y + bottom), round(x0) : round(x1)] = k + 1
        things.append(Thing(character, colour, (x0, y + top, x1, y + bottom)))
    return Picture(np.asarray(card), ids, tuple(things), text)


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
