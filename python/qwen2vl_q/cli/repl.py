"""The conversation at a terminal: line editing, history, slash commands. Lines of a pipe do as well."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2vl_q.cli.chat import answer
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.errors import complain, describe
from qwen2vl_q.errors import Qwen2VLError

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_HELP = """\
/image FILE ...  show pictures with the next question
/system TEXT     set the system prompt; without TEXT, print it
/clear           forget the conversation and start anew
/save FILE       write the conversation: as messages to FILE.json, as Markdown to any other
/stats           times and memory of the last answer
/help            this list
/exit            leave (also Ctrl-D)
Ctrl-C stops an answer. A line that begins with a space is sent as it is, / or not."""


def converse(conversation: Conversation, show_stats: bool) -> bool:
    """Asks line after line until the input ends. What fails is reported, and the conversation goes on; False
    where a line of a pipe has failed."""
    session = _Session(conversation)
    at_terminal = sys.stdin.isatty()
    succeeded = True
    for line in _terminal_lines() if at_terminal else _piped_lines():
        try:
            if line.startswith("/"):
                if not session.command(line):
                    break
            elif line.strip():
                answer(conversation, line)
                if show_stats:
                    click.echo(conversation.stats(), err=True)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            click.echo("(stopped)", err=True)
        except BrokenPipeError:
            raise
        except (Qwen2VLError, ValueError, OSError) as error:
            complain(describe(error))
            succeeded = at_terminal
    return succeeded


class _Session:
    """The slash commands."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/system": self._system,
            "/clear": lambda _: conversation.clear(),
            "/save": self._save,
            "/stats": lambda _: click.echo(conversation.stats(), err=True),
            "/help": lambda _: click.echo(_HELP, err=True),
        }

    def command(self, line: str) -> bool:
        """Does what a line says; False for the end. ValueError for what is no command."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in self._commands:
            raise ValueError(f"no command {name}; /help lists them, a leading space sends the line as it is")
        self._commands[name](rest.strip())
        return True

    def _image(self, rest: str) -> None:
        if not rest:
            raise ValueError("/image FILE ...")
        # A name with spaces as it is; several, or quoted by a terminal that a file was dropped on.
        paths = [rest] if Path(rest).expanduser().exists() else shlex.split(rest)
        for path in paths:
            name = str(Path(path).expanduser())
            click.echo(f"{name}: {self._conversation.attach(name)} tokens", err=True)

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = rest
        click.echo(f"system: {self._conversation.system or 'the default of the template'}", err=True)

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("/save FILE")
        self._conversation.save(Path(rest).expanduser())


def _piped_lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def _terminal_lines() -> Iterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
    from prompt_toolkit.output import create_output

    files = PathCompleter(expanduser=True)
    words = {
        "/image": files,
        "/save": files,
        **dict.fromkeys(["/system", "/clear", "/stats", "/help", "/exit"]),
    }
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=NestedCompleter.from_nested_dict(words),
        complete_while_typing=False,
        output=create_output(always_prefer_tty=True),  # stdout may go to a file
    )
    click.echo("/help lists the commands.", err=True)
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            continue  # drops the line
        except EOFError:
            return
        yield line


def _history() -> History:
    """The lines of former sessions; of this one alone where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "qwen2vl-q"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = folder / "history"
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))
