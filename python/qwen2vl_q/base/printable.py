"""What a file, a request or a caller wrote, made fit for one line of an error message."""

from __future__ import annotations

import re

# C0 and C1 controls (a terminal obeys them), line and paragraph separators, what reorders or hides text, and
# halves of surrogate pairs (no UTF-8 stream takes them).
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def printable(value: object, limit: int = 120) -> str:
    """A string as it is, anything else as its repr; controls escaped, cut after `limit` characters."""
    if isinstance(value, (str, bytes)):
        size = len(value)
        if isinstance(value, bytes):
            value = repr(value[: limit + 1])
        text = value[: limit + 1]
    else:
        try:
            text = repr(value)
        except Exception:  # an integer of thousands of digits, a list within itself too deep ...
            text = f"<{type(value).__name__}>"
        size = len(text)
    cut = text[:limit] + (f"... ({size} in all)" if size > limit else "")
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), cut)
