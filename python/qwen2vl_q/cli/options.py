"""Types of options with the ranges that the engine takes."""

from __future__ import annotations

import math
from typing import Any

import click

COUNT = click.IntRange(1, 2**31 - 1)
SEED = click.IntRange(0, 2**64 - 1)


class FiniteRange(click.FloatRange):
    """Without nan, which passes every comparison, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found
