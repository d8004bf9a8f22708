"""Small forms and receipts: two to four lines like "NAME: ANNA" in Pillow's font, with their fields."""

from __future__ import annotations

import random
from string import ascii_uppercase, digits

import numpy as np
from PIL import ImageDraw

from demo.data import COLOURS, Picture, Thing, font
from qwen2vl_q.demo.cards import blank, jitter, visible_colours

FIELDS = {
    "NAME": ascii_uppercase,
    "CODE": ascii_uppercase + digits,
    "DATE": digits,
    "TOTAL": digits,
    "QTY": digits,
}  # and what their values are made of
LENGTH = (2, 4)  # of a value
FONT_SIZES = (25, 32)
PITCH = 29  # pixels from line to line, at least: a merged cell then holds the middle of one line
LINES = (2, 4)


def _value(rng: random.Random, key: str, room: float) -> str:
    """One whose line fits into so many pixels in the smallest size."""
    while True:
        value = "".join(rng.choices(FIELDS[key], k=rng.randint(*LENGTH)))
        if font(FONT_SIZES[0]).getlength(f"{key}: {value}") <= room:
            return value


def draw_form(rng: random.Random, width: int, height: int) -> Picture:
    """From 168 pixels a side to 84 on; `things` are all letters and digits, line by line."""
    card, background = blank(rng, width, height)
    most = max(LINES[0], min(LINES[1], (height - 12) // PITCH))
    keys = rng.sample(list(FIELDS), rng.randint(LINES[0], most))
    fields = [(key, _value(rng, key, width - 12)) for key in keys]
    lines = [f"{key}: {value}" for key, value in fields]
    size = rng.randint(*FONT_SIZES)
    while max(map(font(size).getlength, lines)) > width - 12:
        size -= 1
    pitch = rng.uniform(max(PITCH, size + 3), max(PITCH, size + 3, min(44, (height - 12) / len(lines))))
    pitch = min(pitch, (height - 10) / len(lines))
    widest = max(map(font(size).getlength, lines))
    x = int(rng.uniform(6, max(6, width - 6 - widest)))
    top = rng.uniform(4, max(4, height - 6 - pitch * len(lines)))
    colour = rng.choice(visible_colours(background))
    fill = jitter(rng, COLOURS[colour], 12)
    ids = np.zeros((height, width), np.uint8)
    things: list[Thing] = []
    for k, line in enumerate(lines):
        _, above, _, below = font(size).getbbox("H0")
        y = int(top + pitch * k + (pitch - (below - above)) / 2 - above)
        ImageDraw.Draw(card).text((x, y), line, font=font(size), fill=fill)
        for i, character in enumerate(line):
            if character in ": ":
                continue
            x0, x1 = x + font(size).getlength(line[:i]), x + font(size).getlength(line[: i + 1])
            things.append(Thing(character, colour, (x0, y + above, x1, y + below)))
            ids[y + above : y + below, round(x0) : round(x1)] = len(things)
    return Picture(np.asarray(card), ids, tuple(things), fields=tuple(fields))
