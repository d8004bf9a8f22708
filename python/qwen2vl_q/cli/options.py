"""Options that commands share, and types of options with the ranges that the engine takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qwen2vl_q.base.printable import printable


class FiniteRange(click.FloatRange):
    """Without nan, which passes every comparison, and infinity."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class IntegerRange(click.IntRange):
    name = "integer"


class _Wide(click.ParamType):  # type: ignore[type-arg]
    """A range whose bounds are no news: errors show them, help does not."""

    def __init__(self, within: IntegerRange | FiniteRange) -> None:
        self._range = within
        self.name = within.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._range.convert(value, param, ctx)


COUNT = _Wide(IntegerRange(1, 2**31 - 1))
COUNT_OR_NONE = _Wide(IntegerRange(0, 2**31 - 1))
FPS = _Wide(FiniteRange(0, 1000, min_open=True))
FRAMES = _Wide(IntegerRange(2, 2**24))
SEED = _Wide(IntegerRange(0, 2**64 - 1))
SECONDS = _Wide(FiniteRange(0, 1e9))
TEMPERATURE = _Wide(FiniteRange(0, 1000))
PENALTY = _Wide(FiniteRange(0, 1000, min_open=True))


def _adapters(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[Path, float]]:
    """Folders with their scales."""
    found = []
    for value in values:
        folder, colon, scale = value.rpartition(":")
        if not colon or Path(value).is_dir():
            folder, scale = value, "1"
        if not Path(folder).is_dir():
            raise click.BadParameter(f"'{printable(folder)}' is not a folder")
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise click.BadParameter(f"'{printable(value)}': expected a number after the colon")
        found.append((Path(folder), number))
    return found


def lora_option(purpose: str) -> Callable[[Any], Any]:
    """--lora DIR[:SCALE]: `lora`, a list of folders with their scales."""
    return click.option(
        "--lora",
        metavar="DIR[:SCALE]",
        multiple=True,
        callback=_adapters,
        help=f"A PEFT adapter {purpose}, with its own scale times SCALE; may be repeated.",
    )
