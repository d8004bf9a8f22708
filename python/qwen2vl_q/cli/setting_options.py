"""The settings of a conversation as options: of `chat`, and by name of `/set`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qwen2vl_q.cli.options import COUNT, COUNT_OR_NONE, FPS, FRAMES, PENALTY, SEED, TEMPERATURE, FiniteRange

Function = TypeVar("Function", bound=Callable[..., Any])

_DECORATORS = (
    click.option(
        "-n",
        "--max-new-tokens",
        type=COUNT,
        metavar="N",
        default=1024,
        show_default=True,
        help="Tokens of an answer, at most.",
    ),
    click.option(
        "--temp",
        "temperature",
        type=TEMPERATURE,
        metavar="T",
        help="0 always takes the likeliest token.  [default of this and the next five: the file's]",
    ),
    click.option(
        "--top-k",
        type=COUNT_OR_NONE,
        metavar="K",
        help="Draw from the K likeliest tokens; 0: from all.",
    ),
    click.option(
        "--top-p",
        type=FiniteRange(0, 1, min_open=True),
        metavar="P",
        help="Draw from the likeliest P of the mass.",
    ),
    click.option(
        "--min-p",
        type=FiniteRange(0, 1, max_open=True),
        metavar="P",
        help="... of the likeliest's probability.",
    ),
    click.option(
        "--repeat-penalty",
        "repetition_penalty",
        type=PENALTY,
        metavar="X",
        help="Above 1, tokens that have come before get less likely.",
    ),
    click.option("--seed", type=SEED, metavar="N", help="Draws the same again."),
    click.option(
        "--min-pixels",
        type=COUNT,
        metavar="N",
        help="Enlarge pictures with fewer.  [default: the file's]",
    ),
    click.option(
        "--max-pixels",
        type=COUNT,
        metavar="N",
        help="Shrink pictures with more.  [default: 1,280 tokens' worth]",
    ),
    click.option(
        "--vision-tokens",
        type=COUNT_OR_NONE,
        metavar="N",
        help="Tokens of a question's pictures and clips together; 0: full resolution.  [default: 1,280 a "
        "picture, 5,120 a clip]",
    ),
    click.option(
        "--fps",
        type=FPS,
        metavar="X",
        help="Frames a second that are shown of clips.  [default: 2]",
    ),
    click.option("--max-frames", type=FRAMES, metavar="N", help="Frames of a clip, at most.  [default: 768]"),
)


def setting_options(function: Function) -> Function:
    """Gives a command an option for each field of Settings."""
    for decorate in reversed(_DECORATORS):
        function = decorate(function)
    return function


@click.command("/set")
@setting_options
def _set(**_: Any) -> None: ...


# By the names without dashes before them: "top-k".
SETTING_OPTIONS = {
    max(option.opts, key=len).removeprefix("--"): option
    for option in _set.params
    if isinstance(option, click.Option)
}
