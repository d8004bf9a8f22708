"""Types of options with the ranges that the engine takes."""

from __future__ import annotations

import math
from typing import Any

import click


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
SEED = _Wide(IntegerRange(0, 2**64 - 1))
TEMPERATURE = _Wide(FiniteRange(0, 1000))
PENALTY = _Wide(FiniteRange(0, 1000, min_open=True))
