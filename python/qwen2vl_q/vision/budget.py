"""How many tokens each picture of a prompt may take."""

from __future__ import annotations

from collections.abc import Sequence


def shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Of each that wants so many, how many it gets: all alike, but none more than it wants, and what small
    ones leave goes to the others. ValueError for a budget below one each."""
    if budget < len(wanted):
        raise ValueError(f"vision_tokens: expected {len(wanted)} or more, one a picture, found {budget}")
    got = [0] * len(wanted)
    left = budget
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for done, i in enumerate(order):
        got[i] = min(wanted[i], left // (len(order) - done))
        left -= got[i]
    return got
