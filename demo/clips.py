"""Short clips of drawn things with their truth: what moves where, what comes first, how often one bounces."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.data import COLOURS, SHAPES, Array, Thing
from qwen2vl_q.demo import cards
from qwen2vl_q.demo.cards import Box, blank, jitter, visible_colours

SIDES = (98, 140)  # of a frame in pixels, from and to
MOVE_FRAMES = (4, 6)
BOUNCE_FRAMES = 8
MOST_BOUNCES = 3
EDGE = 2  # pixels of the card's frame

Place = tuple[float, float, float]  # x, y, radius


@dataclass(frozen=True)
class Clip:
    """`frames` [n, height, width, 3] RGB, n even; `ids` [n, height, width]: 0 background, k: things[k - 1].

    paths[k - 1]: its box in each frame (None: not there). In the frames `touches` it turns at the edge.
    """

    kind: str  # move, order, bounce
    frames: Array
    ids: Array
    things: tuple[Thing, ...]
    paths: tuple[tuple[Box | None, ...], ...]
    touches: tuple[int, ...] = ()

    def resized(self, width: int, height: int) -> Clip:
        """As `qwen2vl_q.vision.video` resizes: bicubic on uint8 RGB."""
        size = (width, height)
        sx, sy = width / self.frames.shape[2], height / self.frames.shape[1]
        frames = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in self.frames]
        ids = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.NEAREST)) for f in self.ids]
        paths = tuple(
            tuple(None if b is None else (b[0] * sx, b[1] * sy, b[2] * sx, b[3] * sy) for b in path)
            for path in self.paths
        )
        return Clip(self.kind, np.stack(frames), np.stack(ids), self.things, paths, self.touches)


def motion(before: Box | None, after: Box | None) -> str:
    """left, right, up or down; "" for a thing that stays, comes or goes."""
    if before is None or after is None:
        return ""
    dx = after[0] + after[2] - before[0] - before[2]
    dy = after[1] + after[3] - before[1] - before[3]
    if max(abs(dx), abs(dy)) < 1:
        return ""
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _names(rng: random.Random, colours: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Colours and shapes, all different."""
    return list(zip(rng.sample(colours, count), rng.sample(SHAPES, count), strict=True))


def _draw(
    rng: random.Random,
    kind: str,
    card: Image.Image,
    names: Sequence[tuple[str, str]],
    places: Sequence[Sequence[Place | None]],
    touches: Sequence[int] = (),
) -> Clip:
    """places[k][i]: of thing k in frame i."""
    fills = [jitter(rng, COLOURS[colour], 12) for colour, _ in names]
    frames, all_ids = [], []
    paths: list[list[Box | None]] = [[] for _ in names]
    for i in range(len(places[0])):
        frame, ids = card.copy(), Image.new("L", card.size)
        draw, draw_id = ImageDraw.Draw(frame), ImageDraw.Draw(ids)
        for k, (_, shape) in enumerate(names):
            place = places[k][i]
            box = place and cards.draw_shape(((draw, fills[k]), (draw_id, k + 1)), shape, *place)
            paths[k].append(box)
        frames.append(np.asarray(frame))
        all_ids.append(np.asarray(ids))
    things = tuple(
        Thing(shape, colour, next(box for box in path if box is not None))
        for (colour, shape), path in zip(names, paths, strict=True)
    )
    return Clip(kind, np.stack(frames), np.stack(all_ids), things, tuple(map(tuple, paths)), tuple(touches))


def draw_move(rng: random.Random, width: int, height: int, count: int) -> Clip:
    """One or two things, each in its own lane; one of them, or both, move along it."""
    card, background = blank(rng, width, height)
    names = _names(rng, visible_colours(background), rng.choice((1, 2)))
    across = rng.random() < 0.5  # lanes from left to right
    length, breadth = (width, height) if across else (height, width)
    lane = breadth / len(names)
    signs = [rng.choice((-1, 1)) if k == 0 or rng.random() < 0.5 else 0 for k in range(len(names))]
    order = list(range(len(names)))
    rng.shuffle(order)
    places: list[list[Place | None]] = []
    for k, sign in zip(order, signs, strict=True):
        radius = rng.uniform(10, min(lane / 2 - 4, 0.2 * length))
        room = length - 2 * radius - 8
        way = sign * rng.uniform(0.45, 1) * room
        start = radius + 4 + max(0.0, -way) + rng.random() * (room - abs(way))
        side = rng.uniform(k * lane + radius + 3, (k + 1) * lane - radius - 3)
        along = [start + way * i / (count - 1) for i in range(count)]
        places.append([(a, side, radius) if across else (side, a, radius) for a in along])
    return _draw(rng, "move", card, names, places)


def draw_order(rng: random.Random, width: int, height: int, count: int) -> Clip:
    """A thing, then another one instead of it; each for two frames or more."""
    card, background = blank(rng, width, height)
    names = _names(rng, visible_colours(background), 2)
    switch = rng.randint(2, count - 2)
    places: list[list[Place | None]] = []
    for k in range(2):
        radius = rng.uniform(12, 0.3 * min(width, height))
        x = rng.uniform(radius + 3, width - radius - 4)
        y = rng.uniform(radius + 3, height - radius - 4)
        places.append([(x, y, radius) if (i >= switch) == (k == 1) else None for i in range(count)])
    return _draw(rng, "order", card, names, places)


def _bounce_frames(rng: random.Random, count: int, bounces: int) -> list[int]:
    """Neither the first nor the last frame, nor two in a row."""
    while True:
        frames = sorted(rng.sample(range(1, count - 1), bounces))
        if all(b - a >= 2 for a, b in itertools.pairwise(frames)):
            return frames


def _bounce_path(rng: random.Random, count: int, touches: Sequence[int]) -> list[float]:
    """Per frame 0..1 between two edges, which it meets in turn, in the frames `touches` and in no other."""
    wall = float(rng.randrange(2))
    if not touches:
        start, end = rng.uniform(0.1, 0.35), rng.uniform(0.65, 0.9)
        keys = [(0, abs(wall - start)), (count - 1, abs(wall - end))]
    else:
        keys = [(frame, abs(wall - k % 2)) for k, frame in enumerate(touches)]

        def away(frames: int, edge: float) -> float:
            return abs(edge - rng.uniform(max(0.35, 0.13 * frames), 0.85))

        keys.insert(0, (0, away(touches[0], keys[0][1])))
        keys.append((count - 1, away(count - 1 - touches[-1], keys[-1][1])))
    frames, where = zip(*keys, strict=True)
    return [float(v) for v in np.interp(range(count), frames, where)]


def draw_bounce(rng: random.Random, width: int, height: int, bounces: int) -> Clip:
    """One thing between two opposite edges."""
    card, background = blank(rng, width, height)
    names = _names(rng, visible_colours(background), 1)
    touches = _bounce_frames(rng, BOUNCE_FRAMES, bounces)
    across = rng.random() < 0.5
    length, breadth = (width, height) if across else (height, width)
    radius = rng.uniform(10, 0.18 * min(width, height))
    x0, y0, x1, y1 = cards.extent(names[0][1], radius)
    low, high = (x0, x1) if across else (y0, y1)
    room = length - 2 * EDGE - 1 - (high - low)
    side = rng.uniform(radius + 10, breadth - radius - 10)
    along = [EDGE - low + u * room for u in _bounce_path(rng, BOUNCE_FRAMES, touches)]
    places: list[Place | None] = [(a, side, radius) if across else (side, a, radius) for a in along]
    return _draw(rng, "bounce", card, names, [places], touches)
