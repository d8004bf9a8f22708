"""Boxes and points that a model writes -> places in the picture that it was shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

THOUSANDTHS = 1000  # of a picture's sides: Qwen2-VL's coordinates are 0 to 999

_MAX_REGIONS = 10_000  # of one answer
_NUMBER = r"(\d{1,6}(?:\.\d{1,6})?)"
_PAIR = re.compile(rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)")
_FLAT = re.compile(r"\s*" + r"[\s,]+".join([_NUMBER] * 4) + r"\s*")  # x0 y0 x1 y1
# A name; places, whose end an answer that was cut may lack; or bare pairs, where markers were left out.
_PIECE = re.compile(
    r"<\|object_ref_start\|>(?P<label>.*?)(?:<\|object_ref_end\|>|(?=<\|box_start\|>)|$)"
    r"|<\|(?P<kind>box|quad|point)_start\|>(?P<place>[^<]*)(?P<end><\|(?:box|quad|point)_end\|>)?"
    r"|(?P<bare>\(\s*\d[^()]*\)(?:\s*,\s*\(\s*\d[^()]*\))*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Region:
    """A place in a picture, in its pixels: `points` has two opposite corners, the upper left first, or one
    point."""

    label: str
    points: tuple[tuple[float, float], ...]

    @property
    def is_point(self) -> bool:
        return len(self.points) == 1

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom; of a point, itself twice."""
        return (*self.points[0], *self.points[-1])


def parse_grounding(text: str, size: tuple[int, int], scale: float = THOUSANDTHS) -> list[Region]:
    """The regions of an answer, in the pixels of a picture of `size` (width, height).

    scale: what the coordinates count of a side: 1000 (Qwen2-VL and most of its fine-tunes), 1 (fractions).
    Read are <|object_ref_start|>name<|object_ref_end|><|box_start|>(x0,y0),(x1,y1)<|box_end|>, any number of
    places to a name, one pair (a point), quads (the box around them), four bare numbers, and pairs without
    any markers. A place that the answer's end cuts is left out; what lies outside is moved to the edge.
    ValueError for a size or a scale that is not positive.
    """
    width, height = size
    if width < 1 or height < 1 or not scale > 0:
        raise ValueError(f"expected a size and a scale above 0, found {width} x {height} and {scale}")
    regions: list[Region] = []
    label = ""
    for piece in _PIECE.finditer(text):
        if piece["label"] is not None:
            label = piece["label"].strip()
            continue
        for points in _places(piece):
            placed = [(min(x / scale, 1) * width, min(y / scale, 1) * height) for x, y in points]
            regions.append(Region(label, _corners(placed)))
            if len(regions) == _MAX_REGIONS:
                return regions
    return regions


def _places(piece: re.Match[str]) -> Iterator[list[tuple[float, float]]]:
    """The points of each place in a piece."""
    text = piece["place"] if piece["kind"] else piece["bare"]
    pairs = [(float(x), float(y)) for x, y in _PAIR.findall(text)]
    if piece["kind"] is None:  # boxes side by side, or a point
        yield from ([pairs] if len(pairs) == 1 else [pairs[i : i + 2] for i in range(0, len(pairs) - 1, 2)])
        return
    if not pairs and (flat := _FLAT.fullmatch(text)):
        x0, y0, x1, y1 = map(float, flat.groups())
        yield [(x0, y0), (x1, y1)]
        return
    # A place without its end may lack pairs.
    wanted = {"box": 2, "quad": 4, "point": 1}[piece["kind"]]
    if pairs and (piece["end"] or len(pairs) >= wanted):
        yield pairs


def _corners(points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    if len(points) == 1:
        return (points[0],)
    xs, ys = zip(*points, strict=True)
    return (min(xs), min(ys)), (max(xs), max(ys))
