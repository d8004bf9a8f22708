"""Tokens that are computed before they are drawn, since they are likely to be."""

from __future__ import annotations

_FIRST = 3  # tokens of a first guess: kernels take rows by fours
_LONGEST_PAUSE = 32  # tokens drawn without a guess


class Guessing:
    """How much one answer guesses. A guess that comes true as a whole makes the next one twice as long,
    another one as long as it was right; after guesses of which nothing was, it pauses, each time for longer.
    So what wrong guesses cost is bounded, and what right ones save is not missed for long."""

    def __init__(self, most: int) -> None:
        """most: tokens at a time; 0: none."""
        self.most = most
        self.guessed = self.confirmed = 0  # in all
        self._length = min(_FIRST, most)
        self._pause = self._misses = 0
        self._under_way = 0

    @property
    def length(self) -> int:
        """Tokens that the next step may guess."""
        return 0 if self._pause else self._length

    def make(self, tokens: int) -> None:
        """So many have been guessed for the step that comes."""
        self._under_way = tokens
        self.guessed += tokens
        self._pause = max(self._pause - 1, 0)

    def learn(self, right: int) -> None:
        """So many of them have been drawn."""
        guessed, self._under_way = self._under_way, 0
        if not guessed:
            return
        self.confirmed += right
        if right:
            self._misses = 0
            self._length = min(self.most, 2 * guessed if right == guessed else right)
        else:
            self._pause = min(2**self._misses, _LONGEST_PAUSE)
            self._misses += 1
            self._length = 1
