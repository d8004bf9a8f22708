"""How far apart two models' next-token distributions are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """Over the same tokens, given to both. Nats a token; infinite where a logit is not finite."""

    tokens: int
    mean: float
    p99: float  # 99 of 100 tokens have less
    agreement: float  # share of the tokens with the same likeliest one

    @classmethod
    def of(cls, compared: Iterable[tuple[Floats, NDArray[np.bool_]]]) -> Divergence:
        """Of `compare`'s results."""
        parts = list(compared)
        each, same = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        finite = bool(np.isfinite(each).all())
        p99 = float(np.quantile(each, 0.99, method="higher"))
        return cls(len(each), float(each.mean()) if finite else np.inf, p99, float(same.mean()))


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Of each row."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    out: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out


def compare(reference: NDArray[np.float32], other: NDArray[np.float32]) -> tuple[Floats, NDArray[np.bool_]]:
    """Of logits [n, vocab_size]: KL(reference || other) of each row, and whether its largest is the same."""
    with np.errstate(invalid="ignore"):
        p, q = log_softmax(reference), log_softmax(other)
        each = (np.exp(p) * (p - q)).sum(-1)
    each = np.where(np.isfinite(each), np.maximum(each, 0), np.inf)
    return each, reference.argmax(-1) == other.argmax(-1)
