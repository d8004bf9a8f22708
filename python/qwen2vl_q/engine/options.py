"""What may be said to `generate` and `chat` by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.printable import printable
from qwen2vl_q.engine.request import Constraint, Progress

MAX_TOP_LOGPROBS = 20  # OpenAI's
MAX_PROMPT_LOOKUP = 32


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
    # What followed where the last tokens stood before is computed with them, so many tokens at most: answers
    # that repeat what has been said come sooner, and are the same. 0: never; None: as the engine thinks best.
    prompt_lookup_num_tokens: int | None


class GenerateOptions(CallOptions, total=False):
    """Of `generate` and `agenerate`."""

    ignore_eos: bool  # end-of-turn tokens end nothing


class AnswerOptions(CallOptions, total=False):
    """Of an `Answer`, whatever it continues."""

    skip_special_tokens: bool  # False: they are shown, but for the one that ends the answer
    # OpenAI's: {"type": "json_object"}, {"type": "json_schema", ...}
    response_format: Mapping[str, Any] | None
    regex: str | None  # that the whole answer matches
    grammar: str | None  # of the whole answer, in Lark as llguidance reads it
    logprobs: bool | None  # of each token; among the details
    top_logprobs: int | None  # and of so many of the likeliest, 20 at most


class CompleteOptions(AnswerOptions, total=False):
    """Of `complete`."""

    ignore_eos: bool  # end-of-turn tokens end nothing


class ChatOptions(AnswerOptions, total=False):
    """Of `chat` and `achat`."""

    tools: Sequence[Mapping[str, Any]] | None  # OpenAI's: [{"type": "function", "function": {...}}]
    tool_choice: str | Mapping[str, Any] | None  # "none", "auto", "required", {"type": "function", ...}
    vision_tokens: int | None  # of all pictures of the prompt together, at most: larger ones are shrunk alike
    add_vision_id: bool  # numbers the pictures ("Picture 1: ")
    chat_template_kwargs: Mapping[str, Any] | None  # further variables of the file's own template


def sampling_options(options: CallOptions) -> dict[str, Any]:
    """Those of them that say how tokens are drawn."""
    return {name: value for name, value in options.items() if name in SamplingOptions.__optional_keys__}


def top_logprobs(options: AnswerOptions) -> int | None:
    """How many log-probabilities are asked for beside a token's own; None: not even that."""
    asked, top = options.get("logprobs"), options.get("top_logprobs")
    if not isinstance(asked, bool | None):
        raise ValueError(f"logprobs: expected True or False, found {printable(asked)}")
    if top is not None and not asked:
        raise ValueError("top_logprobs: expected logprobs=True beside it")
    return (0 if top is None else integer("top_logprobs", top, 0, MAX_TOP_LOGPROBS)) if asked else None


def require_known(options: Mapping[str, Any], kind: type, call: str) -> None:
    """TypeError, as of any function, for an option that `kind` does not have."""
    unknown = options.keys() - kind.__optional_keys__  # type: ignore[attr-defined]
    if unknown:
        raise TypeError(f"{call}() got an unexpected keyword argument {min(unknown)!r}")
