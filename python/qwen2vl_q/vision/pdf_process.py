"""A process that draws pages of the PDF on its stdin, by their numbers; without numbers it counts them.

What goes wrong is its last line on stderr, "unsupported: ..." or "damaged: ...", and its exit code 1.
"""

from __future__ import annotations

import math
import sys
from contextlib import suppress
from typing import Any

from qwen2vl_q.vision.documents import _HEADER, DPI, MAX_PIXELS

_MEMORY = 2**31
_POINTS = 72  # of an inch


def main(numbers: list[int]) -> int:
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        import pypdfium2 as pdfium
    except ImportError:
        return _fail("unsupported: PDF needs another package: pip install 'qwen2vl-q[pdf]'")
    try:
        document = pdfium.PdfDocument(sys.stdin.buffer.read())
        if not numbers:
            sys.stdout.write(str(len(document)))
            return 0
        for number in numbers:
            _draw(document[number - 1])
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            return _fail("unsupported: it is encrypted; save it without a password")
        return _fail(f"damaged: {error}")
    except MemoryError:
        return _fail("unsupported: it needs more than 2 GiB")
    return 0


def _draw(page: Any) -> None:
    width, height = page.get_size()
    if not (0 < width < math.inf and 0 < height < math.inf):
        width, height = 1, 1
    scale = min(DPI / _POINTS, math.sqrt(MAX_PIXELS / (width * height)))
    picture = page.render(scale=scale).to_pil().convert("RGB")
    sys.stdout.buffer.write(_HEADER.pack(*picture.size))
    sys.stdout.buffer.write(picture.tobytes())


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
