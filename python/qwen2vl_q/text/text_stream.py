"""Tokens -> text, as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from qwen2vl_q.base.printable import printable
from qwen2vl_q.text.tokenizer import Tokenizer

MAX_STOPS = 64
MAX_STOP_CHARS = 4096


class TextStream:
    """Turns tokens into text as they come: never half a character, and nothing of a stop string.

    `finished` is set once a stop string has appeared, and the text before it given out, or once one of
    `eos_token_ids` has come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] | None = (),
        eos_token_ids: Iterable[int] = (),
        skip_special: bool = True,
    ) -> None:
        """skip_special: of special tokens, the markers of an answer's own text alone are shown; never the one
        that ends it. ValueError for a stop string that is empty or not a string, and for too many or too
        long ones."""
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(text, str) and text for text in self._stop):
            raise ValueError(f"stop strings must be non-empty strings, found {printable(self._stop)}")
        if len(self._stop) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in self._stop):
            raise ValueError(
                f"stop: expected at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters, "
                f"found {len(self._stop)} of up to {max(map(len, self._stop))}"
            )
        self._held = ""
        self._stopped = False
        self.finished = False

    def push(self, token_id: int) -> str:
        """The text that is certain after one more token."""
        is_end = self.is_end(token_id)
        data = self._tokenizer.token_bytes(token_id, self._skip_special or is_end)
        text = self._give(self._utf8.decode(data))
        self.finished = self._stopped or is_end
        return text

    def is_end(self, token_id: int) -> bool:
        """Whether it ends an answer by itself."""
        return token_id in self._eos_token_ids

    def finish(self) -> str:
        """The rest: what was held back for a stop string that did not come; half a character as U+FFFD."""
        text = "" if self._stopped else self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return text

    def _give(self, text: str) -> str:
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._stopped = True
            return self._held[: min(found)]
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
