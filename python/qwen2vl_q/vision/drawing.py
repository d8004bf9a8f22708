"""Boxes and points drawn over pictures, legible on any of them."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

# Apart from each other for the colour-blind, too (Okabe and Ito, "Color Universal Design").
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_Box = tuple[float, float, float, float]


def draw_regions(picture: Image.Image, regions: Iterable[tuple[str, _Box]]) -> Image.Image:
    """A copy of an RGB picture with labelled boxes (left, top, right, bottom, in pixels); a box without an
    extent is drawn as a point. Each label has its colour."""
    drawn = picture.convert("RGB")
    canvas = ImageDraw.Draw(drawn)
    line = max(2, round(min(drawn.size) / 200))
    font = ImageFont.load_default(max(11, round(min(drawn.size) / 32)))
    colours: dict[str, str] = {}
    for label, box in regions:
        colour = colours.setdefault(label, _COLOURS[len(colours) % len(_COLOURS)])
        left, top, right, bottom = box
        if (left, top) == (right, bottom):
            _point(canvas, left, top, 2 * line, colour)
        else:
            canvas.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=line + 2)
            canvas.rectangle(box, outline=colour, width=line)
        if label:
            _label(canvas, label, box, colour, font)
    return drawn


def _point(canvas: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: str) -> None:
    canvas.ellipse((x - radius - 2, y - radius - 2, x + radius + 2, y + radius + 2), fill="white")
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _label(
    canvas: ImageDraw.ImageDraw,
    label: str,
    box: _Box,
    colour: str,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Above the box where there is room, else inside; never beyond the picture."""
    text = label if len(label) <= 60 else label[:59] + "…"
    width, height = canvas.im.size
    _, _, w, h = canvas.textbbox((0, 0), text, font)
    w, h = w + 6, h + 4
    x = max(0, min(box[0], width - w))
    y = box[1] - h if box[1] >= h else min(box[1], height - h)
    canvas.rectangle((x, y, x + w, y + h), fill=colour)
    canvas.text((x + 3, y + 1), text, "white", font)
