"""Lines typed at a terminal: history, completion."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.output import create_output

from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.pictures import is_clip, is_picture
from qwen2vl_q.cli.setting_options import SETTING_OPTIONS
from qwen2vl_q.cli.slash import COMMANDS, WITH_ARGUMENT

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def _is_conversation(path: str) -> bool:
    return path.endswith(".json")


def _files(wanted: Callable[[str], bool]) -> PathCompleter:
    return PathCompleter(expanduser=True, file_filter=lambda path: Path(path).is_dir() or wanted(path))


class SlashCompleter(Completer):
    """Commands, and what stands behind them: pictures, conversations, settings."""

    def __init__(self) -> None:
        self._paths = {
            "/image": _files(is_picture),
            "/video": _files(is_clip),
            "/load": _files(_is_conversation),
            "/save": _files(_is_conversation),
        }

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            words = [f"{name} " if name in WITH_ARGUMENT else name for name in COMMANDS]
            yield from _of_words(words, command)
        elif command == "/set":
            yield from _of_words([f"{name} " for name in SETTING_OPTIONS], rest)
        elif command in self._paths:
            # The whole may be one name with spaces; else the last of several is meant.
            for typed in (rest.lstrip(), rest.rpartition(" ")[2]):
                found = list(self._paths[command].get_completions(Document(typed), complete_event))
                if found:
                    yield from map(_into_folder, found)
                    return


def _into_folder(path: Completion) -> Completion:
    """A folder's with the separator, so that the next Tab shows what is in it."""
    return Completion(f"{path.text}/", display=path.display) if path.display_text.endswith("/") else path


def _of_words(words: Iterable[str], typed: str) -> Iterator[Completion]:
    return (Completion(word, -len(typed)) for word in words if word.startswith(typed))


def typed_lines() -> Iterator[str]:
    session: PromptSession[str] = PromptSession(
        history=_history(),
        completer=SlashCompleter(),
        complete_while_typing=False,
        output=create_output(always_prefer_tty=True),  # stdout may go to a file
    )
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:  # drops the line
            if not session.default_buffer.text:
                say("/exit leaves (also Ctrl-D)")
            continue
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
