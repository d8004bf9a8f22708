"""What a command says: notes on stderr, and texts that a terminal must not obey."""

from __future__ import annotations

import contextlib
import re

import click

from qwen2vl_q.base.printable import printable

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but newline and tab
_LONGEST = 4000  # characters of a line on stderr


def say(line: str, dim: bool = False) -> None:
    """A line on stderr. Who does not listen misses it: the results matter more."""
    with contextlib.suppress(OSError):
        click.echo(click.style(printable(line, _LONGEST), dim=dim or None), err=True)


def count(number: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def harmless(text: str) -> str:
    """A model's words with control characters other than newline and tab escaped."""
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
