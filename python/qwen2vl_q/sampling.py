"""The file's sampling defaults (general.sampling.*), and a caller's wishes over them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen2vl_q._native import Sampler
from qwen2vl_q.errors import FormatError

_KEYS = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, penalty 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: another one for every call

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> Sampling:
        """The file's own. FormatError, naming the key, for a value that is not a number from 0."""
        found = {}
        for name, key in _KEYS.items():
            value = metadata.get(f"general.sampling.{key}")
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise FormatError(
                    f"{path}: general.sampling.{key}: expected a number from 0, found {value!r}"
                )
            found[name] = int(value) if name == "top_k" else float(value)
        return cls(**found)  # type: ignore[arg-type]

    def override(self, wishes: Mapping[str, Any]) -> Sampling:
        """These settings with every wish that is not None.

        A wish for a temperature drops the file's own top_k, top_p and min_p, which were chosen for its own
        temperature (the released files say top_k 1: no temperature would change anything).
        """
        given = {name: value for name, value in wishes.items() if value is not None}
        base = Sampling(repetition_penalty=self.repetition_penalty) if "temperature" in given else self
        return replace(base, **given)

    def sampler(self) -> Sampler:
        """A fresh sampler. ValueError for settings out of range."""
        seed = secrets.randbits(64) if self.seed is None else self.seed
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, found {seed}")
        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, seed)
