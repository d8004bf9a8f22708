"""The slash commands of a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

import click

from qwen2vl_q.cli.conversation import CLIP_TOKENS, DEFAULT_TOKENS, Conversation
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.paths import typed_path
from qwen2vl_q.cli.pictures import clip_path, clipboard_pictures, picture_path, split_words
from qwen2vl_q.cli.setting_options import SETTING_OPTIONS
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.cli.turn import attach, attach_clip, show
from qwen2vl_q.vision.video import FPS, MAX_FRAMES

_HELP = """\
/image FILE ...  show pictures with the next question; or drop them on the terminal, a question behind them
/video FILE ...  show clips with it; a part of one is clip.mp4#t=10,25
/paste           show the picture of the clipboard with it
/system TEXT     set the system prompt; without TEXT, print it
/set NAME VALUE  change a setting ("default": the model's own); without NAME, print all
/clear           forget the conversation and start anew
/save FILE       write the conversation: as messages to FILE.json, as Markdown to FILE.md
/load FILE.json  go on with a conversation that /save has written
/stats           times and memory of the last answer
/help            this list
/exit            leave (also Ctrl-D)
Ctrl-C stops an answer. A line that begins with a space is sent as it is, / or not."""
COMMANDS = tuple(line.split()[0] for line in _HELP.splitlines() if line.startswith("/"))
WITH_ARGUMENT = tuple(name for name in COMMANDS if re.search(f"^{name} [A-Z]", _HELP, re.MULTILINE))


_UNSAID = {
    "seed": "drawn anew",
    "vision-tokens": f"{DEFAULT_TOKENS:,} a picture, {CLIP_TOKENS:,} a clip",
    "fps": f"{FPS:g}",
    "max-frames": str(MAX_FRAMES),
}


class SlashCommands:
    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/video": self._video,
            "/paste": lambda _: self._paste(),
            "/system": self._system,
            "/set": self._set,
            "/clear": lambda _: conversation.clear(),
            "/save": self._save,
            "/load": self._load,
            "/stats": lambda _: say(conversation.stats()),
            "/help": lambda _: self._help(),
        }

    def run(self, line: str) -> bool:
        """Does what a line says; False for the end. ValueError for what is no command."""
        name, _, rest = line.strip().partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name not in self._commands:
            close = get_close_matches(name, COMMANDS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(
                f"no command {name}{meant}; /help lists them, a leading space sends the line as it is"
            )
        self._commands[name](rest.strip())
        return True

    def _image(self, rest: str) -> None:
        for name in _files(rest, "/image"):
            attach(self._conversation, picture_path(name), "/set vision-tokens 0")

    def _video(self, rest: str) -> None:
        for name in _files(rest, "/video"):
            attach_clip(self._conversation, clip_path(name))

    def _paste(self) -> None:
        for name, picture in clipboard_pictures():
            show(self._conversation, name, picture, "/set vision-tokens 0")

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = rest
        say(f"system: {self._conversation.system or 'the default of the template'}")

    def _set(self, rest: str) -> None:
        options = SETTING_OPTIONS
        given, _, value = rest.partition(" ")
        wanted = given.strip("-").replace("_", "-").lower()
        names = [name for name, option in options.items() if wanted in (name, option.name.replace("_", "-"))]
        if given and not names:
            raise ValueError(f"/set: expected one of {', '.join(options)}, found {given}")
        if value:
            self._change(names[0], options[names[0]], value.strip())
        in_use = self._conversation.settings_in_use()
        for name in names or options:
            value = in_use[options[name].name]
            own = getattr(self._conversation.settings, options[name].name) is None
            shown = _UNSAID[name] if value is None else f"{value:.6g}" if isinstance(value, float) else value
            say(f"{name} {shown}{' (default)' if own else ''}")

    def _change(self, name: str, option: click.Option, value: str) -> None:
        default = Settings.__dataclass_fields__[option.name].default
        try:
            wish = default if value == "default" else option.type.convert(value, None, None)
        except click.BadParameter as error:
            raise ValueError(f"{name}: {error.message}") from None
        self._conversation.set(**{option.name: wish})
        if name.endswith("pixels"):
            for tokens in self._conversation.pending_tokens():
                say(f"the picture to come: {tokens:,} tokens")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ValueError("expected /save FILE.json or FILE.md")
        path = typed_path(rest)
        self._conversation.save(path)
        say(f"{path}: saved")

    def _load(self, rest: str) -> None:
        if not rest:
            raise ValueError("expected /load FILE.json")
        path = typed_path(rest)
        say(f"{path}: {self._conversation.load(path)}")

    def _help(self) -> None:
        for line in _HELP.splitlines():
            say(line)


def _files(rest: str, command: str) -> list[str]:
    """A name with spaces as it is; several, or quoted by a terminal that a file was dropped on."""
    if not rest:
        raise ValueError(f"expected {command} FILE ...")
    return [rest] if typed_path(rest).exists() else split_words(rest)
