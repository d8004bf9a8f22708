"""The file's sampling defaults (general.sampling.*), and a caller's wishes over them."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from qwen2vl_q._native import Sampler
from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable

_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
# Of those that are float32 natively: whether it is in range, and the range in words.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a number of 0 or more"),
    "top_p": (lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "min_p": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a positive number"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
}
_MOST_BIAS = 100


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, a repetition penalty
    of 1 and the other penalties' 0 are off.

    In this order: repetition_penalty divides the logit of a token that stands anywhere so far (multiplies it
    where it is negative); one that has been drawn loses presence_penalty, and frequency_penalty each time;
    logit_bias[token] is added; no_repeat_ngram_size tokens in a row, of the prompt or drawn, never come
    again; temperature; top_k, top_p and min_p (of the likeliest's probability) cut.

    ValueError for values of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # -100 to 100 of token ids
    seed: int | None = None  # None: another one for every call

    def __post_init__(self) -> None:
        for name, (in_range, expected) in _RANGES.items():
            value = getattr(self, name)
            if not _is_number(value) or not in_range(_float32(value)):
                raise ValueError(f"{name}: expected {expected}, found {printable(value)}")
        for name in ("top_k", "no_repeat_ngram_size"):
            integer(name, getattr(self, name), 0, 2**31 - 1)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias: expected {{token id: bias}}, found {printable(self.logit_bias)}")
        for token, bias in self.logit_bias.items():
            integer("logit_bias: token id", token, 0, 2**31 - 1)
            if not _is_number(bias) or not abs(_float32(bias)) <= _MOST_BIAS:
                expected = f"-{_MOST_BIAS} to {_MOST_BIAS}"
                raise ValueError(f"logit_bias: token {token}: expected {expected}, found {printable(bias)}")
        if self.seed is not None:
            integer("seed", self.seed, 0, 2**64 - 1)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> Sampling:
        """The file's own. FormatError, naming the key, for a value of another type or out of range."""
        found = {}
        for name, key in _KEYS.items():
            value = metadata.get(f"general.sampling.{key}")
            if value is None:
                continue
            try:
                cls(**{name: value})
            except ValueError as error:
                _, _, problem = str(error).partition(": ")
                raise FormatError(f"{path}: general.sampling.{key}: {problem}") from None
            found[name] = value
        return cls(**found)

    def override(self, wishes: Mapping[str, Any]) -> Sampling:
        """These settings with every wish that is not None.

        A wish for a temperature drops the file's own top_k, top_p and min_p, which were chosen for its own
        temperature (the released files say top_k 1: no temperature would change anything).
        """
        given = {name: value for name, value in wishes.items() if value is not None}
        base = Sampling(repetition_penalty=self.repetition_penalty) if "temperature" in given else self
        return replace(base, **given)

    def within(self, vocab_size: int) -> Sampling:
        """Itself. ValueError for a bias of a token beyond the vocabulary."""
        for token in self.logit_bias:
            integer("logit_bias: token id", token, 0, vocab_size - 1)
        return self

    def sampler(self, nth: int = 0) -> Sampler:
        """A fresh sampler, for the nth of several answers: its seed is so much larger."""
        seed = secrets.randbits(64) if self.seed is None else (int(self.seed) + nth) % 2**64
        return Sampler(
            float(self.temperature),
            int(self.top_k),
            float(self.top_p),
            float(self.min_p),
            float(self.repetition_penalty),
            float(self.presence_penalty),
            float(self.frequency_penalty),
            int(self.no_repeat_ngram_size),
            {int(token): float(bias) for token, bias in self.logit_bias.items()},
            seed,
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float32(value: Any) -> float:
    """As native code takes it; infinite where it is too large."""
    try:
        return ctypes.c_float(float(value)).value
    except OverflowError:  # an integer beyond any float
        return math.inf
