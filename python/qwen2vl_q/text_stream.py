"""Tokens -> text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from qwen2vl_q.tokenizer import Tokenizer


class TextStream:
    """Turns tokens into text as they come: never half a character, and nothing of a stop string.

    `finished` is set once a stop string has appeared; the text before it has then been given out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        if not all(isinstance(text, str) and text for text in self._stop):
            raise ValueError(f"stop strings must be non-empty strings, found {self._stop!r}")
        self._held = ""
        self.finished = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token."""
        return self._give(self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special=True)))

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come; half a character as U+FFFD."""
        text = self._give(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _give(self, text: str) -> str:
        if self.finished:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        self.finished = bool(found)
        if found:
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
