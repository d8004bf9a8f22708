"""The conversation: lines of a terminal or a pipe, each a question or a command."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.errors import complain, describe
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.pictures import split_dropped
from qwen2vl_q.cli.slash import SlashCommands
from qwen2vl_q.cli.turn import answer, attach


def converse(conversation: Conversation, show_stats: bool) -> bool:
    """Asks line after line until the input ends. What fails is reported, and the conversation goes on; False
    where a line of a pipe has failed."""
    commands = SlashCommands(conversation)
    at_terminal = sys.stdin.isatty()
    succeeded = True
    for line in _terminal_lines() if at_terminal else _piped_lines():
        try:
            if not _obey(conversation, commands, line, show_stats):
                break
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            say("(stopped)")
        except BrokenPipeError:
            raise
        except Exception as error:
            complain(describe(error))
            succeeded = at_terminal
    return succeeded


def _obey(conversation: Conversation, commands: SlashCommands, line: str, show_stats: bool) -> bool:
    """Answers a question or does a command; False for the end."""
    pictures, question = ([], line) if line.startswith(" ") else split_dropped(line)
    for picture in pictures:
        attach(conversation, picture, "/set vision-tokens 0")
    if not pictures and line.startswith("/"):
        return commands.run(line)
    if question.strip():
        answer(conversation, question)
        if conversation.is_full:
            say("/clear forgets the conversation; then there is room again", dim=True)
        if show_stats:
            say(conversation.stats())
    return True


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def _terminal_lines() -> Iterator[str]:
    from qwen2vl_q.cli.line_editor import typed_lines

    say("/help lists the commands, /exit leaves.")
    return typed_lines()
