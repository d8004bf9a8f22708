"""How a user names pictures: on the command line, in the conversation, by dropping a file on the terminal."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.paths import typed_path

if TYPE_CHECKING:
    from PIL import Image

    from qwen2vl_q.chat.messages import VideoPart

_ADDRESS = re.compile("(file|https?):", re.IGNORECASE)
_PICTURE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|pdf)$", re.IGNORECASE)
_CLIP = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|mpe?g|flv|wmv|ogv|3gp)$", re.IGNORECASE)
_SUFFIX = re.compile(rf"({_PICTURE.pattern[:-1]}|{_CLIP.pattern[:-1]})(?=\s|$)", re.IGNORECASE)
_TIME = r"(\d{1,5}(?::\d{1,2}){0,2}(?:\.\d{1,6})?)"
_TIMES = re.compile(rf"(?:#t={_TIME}?(?:,{_TIME})?)?")
_QUOTED = r'"[^"]*"|[^\s"]' if os.name == "nt" else r"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s'"\\]"""
_WORD = re.compile(rf"(?:{_QUOTED})+(?=\s|$)")
_LONGEST_PATH = 4096
_MAX_CLIP_BYTES = 2**31
_MAX_BYTES = 512 * 1024 * 1024  # an uncompressed picture of the most pixels that are decoded


class _File(click.Path):
    """What a function makes a path of; "-" stays: stdin."""

    def __init__(self, path_of: Callable[[str], str]) -> None:
        super().__init__()
        self._path_of = path_of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "-":
            return "-"
        try:
            return self._path_of(value)
        except ValueError as error:
            self.fail(str(error).removeprefix("picture: "), param, ctx)


def picture_path(name: str) -> str:
    """The path of what may be a file:// address or begin with ~; an http(s) address stays. OSError where no
    such file is."""
    if is_address(name):
        return name
    if _ADDRESS.match(name):
        from qwen2vl_q.chat.messages import read_source

        name = str(read_source(name, "picture"))
    from qwen2vl_q.vision.documents import split_pages

    file, pages = split_pages(name)
    path = typed_path(file)
    path.stat()
    return str(path) if pages is None else f"{path}#{pages}"


picture_file = _File(picture_path)


def picture_from_stdin() -> bytes:
    """ValueError where it holds more than a picture can."""
    return _stdin("--image", _MAX_BYTES)


def _stdin(option: str, most: int) -> bytes:
    data = sys.stdin.buffer.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{option} -: expected {most // 2**20} MiB at most")
    return data


def clip_path(name: str) -> str:
    """As picture_path; a part of a clip is a.mp4#t=10,25 (seconds, or 1:02:03). ValueError for times that are
    none."""
    file, times = _split_times(name)
    _seconds(times)
    return f"{picture_path(file)}{times}"


clip_file = _File(clip_path)


def typed_clip(name: str, fps: float | None, max_frames: int | None) -> VideoPart:
    """What `clip_path` has checked."""
    from qwen2vl_q.chat.messages import VideoPart
    from qwen2vl_q.vision.video import VideoOptions

    file, times = _split_times(name)
    start, end = _seconds(times)
    options = VideoOptions(fps=fps, max_frames=max_frames, start=start, end=end)
    if file == "-":
        return VideoPart(_stdin("--video", _MAX_CLIP_BYTES), options)
    return VideoPart(fetched(file) if is_address(file) else str(Path(file).absolute()), options)


def is_clip(path: str) -> bool:
    """By its name."""
    return _CLIP.search(_split_times(path)[0]) is not None


def _split_times(name: str) -> tuple[str, str]:
    """A media fragment's, behind the file that it is of."""
    file, mark, times = name.rpartition("#t=")
    return (file, mark + times) if mark and not Path(name).exists() else (name, "")


def _seconds(times: str) -> tuple[float | None, float | None]:
    match = _TIMES.fullmatch(times)
    if match is None:
        raise ValueError(f"expected times as #t=10,25 or #t=1:02:03, found {times}")
    found = []
    for time in match.groups():
        parts = [float(part) for part in reversed(time.split(":"))] if time else []
        found.append(sum(part * 60**i for i, part in enumerate(parts)) if parts else None)
    start, end = found
    if end is not None and end <= (start or 0):
        raise ValueError(f"expected times in order, found {times}")
    return start, end


def is_address(name: str) -> bool:
    """Of the network."""
    return name[:8].lower().startswith(("http://", "https://"))


def fetched(address: str) -> bytes:
    """What a typed address names: a picture of at most 64 MiB, from a public host, within 20 seconds."""
    from qwen2vl_q.cli.output import say
    from qwen2vl_q.vision.fetch import Fetcher

    say(f"fetching {address}", dim=True)
    return Fetcher(frozenset({"*"})).fetch(address, "picture")


def typed_pictures(name: str) -> list[tuple[str, str | bytes]]:
    """What is shown for a typed name, each with what to call it: a picture, or a document's pages
    (doc.pdf#3-5)."""
    from qwen2vl_q.vision.documents import load_pages, split_pages

    path, pages = split_pages(name)
    if pages is None and not path.lower().endswith(".pdf"):
        return [("stdin" if name == "-" else name, typed_picture(name))]
    return [(f"{path}#{number}", _png(picture)) for number, picture in load_pages(path, pages)]


def clipboard_pictures() -> list[tuple[str, str | bytes]]:
    """What has been copied: a picture, or picture files; each with what to call it. ValueError where that is
    something else, or the system has no clipboard that can be read."""
    from PIL import ImageGrab

    try:
        found = ImageGrab.grabclipboard()
    except (NotImplementedError, OSError) as error:  # the first of Pillow, where there is no clipboard
        raise ValueError(f"/paste: the clipboard cannot be read: {printable(str(error))}") from None
    if isinstance(found, list):
        return [(name, picture_path(name)) for name in found if is_picture(name)]
    if found is None:
        raise ValueError("/paste: the clipboard holds no picture")
    return [("clipboard", _png(found))]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def typed_picture(name: str) -> str | bytes:
    """A path, or what stdin (-) or an address holds."""
    if name == "-":
        return picture_from_stdin()
    return fetched(name) if is_address(name) else name


def is_picture(path: str) -> bool:
    """By its name."""
    return _PICTURE.search(path) is not None


def split_words(text: str) -> list[str]:
    """As a shell does; on Windows, where paths have backslashes, by spaces and double quotes.

    ValueError for half a pair of quotes.
    """
    return [word.strip('"') for word in _WORD.findall(text)] if os.name == "nt" else shlex.split(text)


def split_dropped(line: str) -> tuple[list[str], str]:
    """The files that were dropped on a terminal, and the question behind them.

    Terminals write an absolute path, in quotes, with backslashes, bare, or as a file:// address. What is
    not there is the question's. Errors as of picture_path for a picture's address.
    """
    paths = []
    rest = line.strip()
    while dropped := _dropped(rest[:_LONGEST_PATH]):
        path, length = dropped
        paths.append(path)
        rest = rest[length:].lstrip()
    return paths, rest


def _dropped(text: str) -> tuple[str, int] | None:
    """The file that a text begins with, and how much of the text names it."""
    word = _WORD.match(text)
    if word is not None:
        name = split_words(word[0])[0]
        if _ADDRESS.match(name) and _SUFFIX.search(name):
            return picture_path(name), word.end()
        if _is_absolute_file(name):
            return str(typed_path(name)), word.end()
    for suffix in _SUFFIX.finditer(text):  # bare, with spaces
        if _is_absolute_file(text[: suffix.end()]):
            return str(typed_path(text[: suffix.end()])), suffix.end()
    return None


def _is_absolute_file(name: str) -> bool:
    path = typed_path(name)
    return path.is_absolute() and path.is_file()
