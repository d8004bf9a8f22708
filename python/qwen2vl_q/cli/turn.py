"""A turn of a conversation, as a command shows it: pictures on their way, the answer as it comes."""

from __future__ import annotations

import sys
import warnings
from contextlib import closing
from typing import TYPE_CHECKING

from qwen2vl_q.cli.output import harmless, say
from qwen2vl_q.cli.pictures import is_clip, typed_clip, typed_pictures

if TYPE_CHECKING:
    from qwen2vl_q.chat.messages import VideoPart
    from qwen2vl_q.cli.conversation import Conversation


def answer(conversation: Conversation, question: str, prefix: str = "") -> None:
    """Streams an answer to stdout, and says where it was cut. Ctrl-C raises KeyboardInterrupt, after the line
    has been ended."""
    written = False
    shown = harmless if sys.stdout.isatty() else str
    try:
        with closing(conversation.ask(question)) as pieces:
            for piece in pieces:
                text = shown(piece if written else prefix + piece)
                written = True  # before the write: what interrupts it may come after the text
                sys.stdout.write(text)
                sys.stdout.flush()
    finally:
        if written:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if why := conversation.cut_short():
        say(why, dim=True)


def attach(conversation: Conversation, typed: str, option: str, tell: bool = True) -> None:
    """`show` or `show_clip` of what a typed name stands for."""
    if is_clip(typed):
        attach_clip(conversation, typed)
        return
    for name, picture in typed_pictures(typed):
        show(conversation, name, picture, option, tell)


def attach_clip(conversation: Conversation, typed: str) -> None:
    settings = conversation.settings
    show_clip(conversation, typed, typed_clip(typed, settings.fps, settings.max_frames))


def show(conversation: Conversation, name: str, picture: str | bytes, option: str, tell: bool = True) -> None:
    """Shows a picture with the next question and says how many tokens it takes; without `tell` only where
    nobody has said how many, and its full resolution, which `option` gives, would take more."""
    tokens, most = conversation.attach(picture)
    shrunk = tokens < most and conversation.settings.shrinks_by_default
    less = f" of {most:,} at full resolution ({option})" if shrunk else ""
    if tell or less:
        say(f"{name}: {tokens:,} tokens{less}")


def show_clip(conversation: Conversation, name: str, clip: VideoPart) -> None:
    """Shows a clip with the next question, and says what is seen of it; and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frames, width, height, tokens = conversation.attach_clip(clip)
    for warning in caught:
        say(f"warning: {warning.message}")
    say(f"{name}: {frames} frames of {width} x {height}, {tokens:,} tokens (--vision-tokens, --fps)")
