"""What may be said to `generate` and `chat` by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from qwen2vl_q.engine.request import Constraint, Progress


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn (`Sampling`). None is as not said: `chat` then does what the file says,
    `generate` draws greedily."""

    temperature: float | None  # 0 is greedy
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None  # of tokens drawn, as OpenAI's; the prompt does not count
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: Mapping[int, float] | None  # token id -> -100 to 100
    seed: int | None  # None: another one for every call


class CallOptions(SamplingOptions, total=False):
    """Of `generate` and `chat` alike."""

    max_new_tokens: int
    stop: str | Sequence[str] | None  # texts that end an answer, and are no part of it
    progress: Progress | None
    constraint: Constraint | None  # asked before each token which ones may be drawn; of one call


class GenerateOptions(CallOptions, total=False):
    """Of `generate` and `agenerate`."""

    ignore_eos: bool  # end-of-turn tokens end nothing


class ChatOptions(CallOptions, total=False):
    """Of `chat` and `achat`."""

    skip_special_tokens: bool  # False: they are shown, but for the one that ends the answer
    add_vision_id: bool  # numbers the pictures ("Picture 1: ")
    chat_template_kwargs: Mapping[str, Any] | None  # further variables of the file's own template


def sampling_options(options: CallOptions) -> dict[str, Any]:
    """Those of them that say how tokens are drawn."""
    return {name: value for name, value in options.items() if name in SamplingOptions.__optional_keys__}


def require_known(options: Mapping[str, Any], kind: type, call: str) -> None:
    """TypeError, as of any function, for an option that `kind` does not have."""
    unknown = options.keys() - kind.__optional_keys__  # type: ignore[attr-defined]
    if unknown:
        raise TypeError(f"{call}() got an unexpected keyword argument {min(unknown)!r}")
