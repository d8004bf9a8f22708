"""How a user names pictures: on the command line, in the conversation, by dropping a file on the terminal."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.cli.paths import typed_path

if TYPE_CHECKING:
    from PIL import Image

_ADDRESS = re.compile("(file|https?):", re.IGNORECASE)
_SUFFIX = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|pdf)(?=\s|$)", re.IGNORECASE)
_QUOTED = r'"[^"]*"|[^\s"]' if os.name == "nt" else r"""'[^']*'|"(?:[^"\\]|\\.)*"|\\.|[^\s'"\\]"""
_WORD = re.compile(rf"(?:{_QUOTED})+(?=\s|$)")
_LONGEST_PATH = 4096
_MAX_BYTES = 512 * 1024 * 1024  # an uncompressed picture of the most pixels that are decoded


class _PictureFile(click.Path):
    """A picture's path; "-" stays: stdin."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value == "-":
            return "-"
        try:
            return picture_path(value)
        except ValueError as error:
            self.fail(str(error).removeprefix("picture: "), param, ctx)


picture_file = _PictureFile()


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


def picture_from_stdin() -> bytes:
    """ValueError where it holds more than a picture can."""
    data = sys.stdin.buffer.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"--image -: expected a picture of {_MAX_BYTES // 2**20} MiB at most")
    return data


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
    return _SUFFIX.search(path) is not None


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
        if _ADDRESS.match(name) and is_picture(name):
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
