"""Pages of documents as pictures: PDF (extra: pdf) and TIFF.

PDF's interpreter is large and its input hostile: it runs in a process of its own, which has so much time and
memory.
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path

from PIL import Image

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.image_processor import load_image

MAX_PAGES = 64  # of one call
MAX_NUMBER = 10**6  # of a page
DPI = 150
MAX_PIXELS = 2**23  # of a page: larger ones are drawn smaller
MAX_BYTES = 2**29  # of a PDF
SECONDS_A_PAGE = 20

_RANGE = re.compile(r"(\d{1,7})(?:-(\d{1,7})?)?")
_HEADER = struct.Struct("<II")  # width, height; then RGB


def split_pages(name: str) -> tuple[str, str | None]:
    """ "doc.pdf#3-5" -> ("doc.pdf", "3-5"); what is no document, or is called so, stays whole."""
    path, mark, pages = name.rpartition("#")
    if mark and is_document(path) and not Path(name).exists():
        return path, pages
    return name, None


def is_document(name: str) -> bool:
    """By its name; a TIFF may have one page alone, and is a picture then."""
    return name.lower().endswith((".pdf", ".tif", ".tiff"))


def page_numbers(pages: str | None, count: int, name: str = "pages") -> list[int]:
    """From 1: of "3", "3-5", "7-" (to the end), "1,4-5", in that order; None: all. ValueError for what is
    none of these, for a page that is not there, and for more than MAX_PAGES."""
    found: list[int] = []
    for part in [f"1-{count}"] if pages is None else pages.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"{name}: expected pages as 3, 3-5 or 1,4-, found {printable(pages)}")
        first = int(match[1])
        last = count if part.strip().endswith("-") else int(match[2] or first)
        if not 1 <= first <= last <= count:
            raise ValueError(f"{name}: expected pages within 1-{count}, found {printable(part.strip())}")
        if len(found) + last - first + 1 > MAX_PAGES:
            raise ValueError(
                f"{name}: expected at most {MAX_PAGES} pages at a time; #1-{MAX_PAGES} names them"
            )
        found += range(first, last + 1)
    return found


def load_pages(
    document: str | PathLike[str] | bytes, pages: str | None = None
) -> list[tuple[int, Image.Image]]:
    """Pages of a PDF, at DPI or what MAX_PIXELS allow, or of a TIFF: their numbers, and upright RGB pictures.

    pages: `page_numbers`. OSError for a file that cannot be read, FormatError for one that is damaged,
    UnsupportedError for an encrypted one, where pypdfium2 is missing, or for a page that takes too much time
    or memory, ValueError for pages that are not there.
    """
    name = "the document" if isinstance(document, bytes) else printable(fspath(document), 1000)
    data = document if isinstance(document, bytes) else _read(Path(document), name)
    if data[:1024].find(b"%PDF-") >= 0:
        return _pdf_pages(data, pages, name)
    return list(_frames(data, pages, name))


def _read(path: Path, name: str) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise UnsupportedError(f"{name}: expected at most {MAX_BYTES // 2**20} MiB")
    return data


def _frames(data: bytes, pages: str | None, name: str) -> Iterator[tuple[int, Image.Image]]:
    """Of a TIFF, or the one of another picture."""
    try:
        picture = Image.open(io.BytesIO(data), formats=("TIFF",))
    except Exception:
        page_numbers(pages, 1, name)
        yield 1, load_image(data)
        return
    with picture:
        try:
            count = getattr(picture, "n_frames", 1)
        except Exception as error:
            raise FormatError(f"{name}: damaged: {printable(str(error))}") from None
        for number in page_numbers(pages, min(count, MAX_NUMBER), name):
            try:
                picture.seek(number - 1)
                frame = picture.copy()
            except Exception as error:
                raise FormatError(f"{name}: page {number}: damaged: {printable(str(error))}") from None
            yield number, load_image(frame)


# --- PDF: this side ---


def _pdf_pages(data: bytes, pages: str | None, name: str) -> list[tuple[int, Image.Image]]:
    count = int(_ask(data, [], name))
    numbers = page_numbers(pages, min(count, MAX_NUMBER), name)
    drawn = _ask(data, numbers, name)
    found, at = [], 0
    for number in numbers:
        if at + _HEADER.size > len(drawn):
            raise FormatError(f"{name}: page {number}: nothing was drawn")
        width, height = _HEADER.unpack_from(drawn, at)
        at += _HEADER.size
        pixels = drawn[at : at + 3 * width * height]
        found.append((number, Image.frombytes("RGB", (width, height), pixels)))
        at += 3 * width * height
    return found


def _ask(data: bytes, numbers: Sequence[int], name: str) -> bytes:
    """Of the other process: those pages, or of none the count."""
    command = [sys.executable, "-m", "qwen2vl_q.vision.pdf_process", *map(str, numbers)]
    seconds = SECONDS_A_PAGE * max(1, len(numbers))
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{name}: its pages are not drawn within {seconds} seconds") from None
    if done.returncode == 0:
        return done.stdout
    kind, _, message = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2].partition(": ")
    if kind == "unsupported":
        raise UnsupportedError(f"{name}: {printable(message, 300)}")
    if kind == "damaged":
        raise FormatError(f"{name}: {printable(message, 300)}")
    raise UnsupportedError(f"{name}: its interpreter has failed, or needs more than 2 GiB")
