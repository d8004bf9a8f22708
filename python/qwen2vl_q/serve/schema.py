"""What clients may say: the OpenAI API's fields that mean something here, and this project's own.

Whatever else a body holds is refused by name, but for null. Ranges and deeper forms (messages, tools,
response_format) are checked by the model's own `chat`, which names what is wrong in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from qwen2vl_q.serve.errors import HttpError

MAX_PROMPTS = 64  # of a completion

Number = StrictFloat | StrictInt
Count = Annotated[StrictInt, Field(ge=1, le=2**31 - 1)]
Objects = Annotated[list[dict[str, Any]], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool = False


class Asked(Body):
    """Of both kinds of completions."""

    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    seed: StrictInt | None = None
    n: Count = 1
    stop: StrictStr | list[StrictStr] | None = None
    logit_bias: dict[str, Number] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    no_repeat_ngram_size: StrictInt | None = None
    prompt_lookup_num_tokens: StrictInt | None = None
    skip_special_tokens: StrictBool | None = None
    response_format: dict[str, Any] | None = None
    regex: StrictStr | None = None
    grammar: StrictStr | None = None
    user: StrictStr | None = None  # means nothing here, and harms nothing

    @property
    def max_answer_tokens(self) -> int | None:
        return self.max_tokens

    def require_consistent(self) -> None:
        """HttpError for fields that exclude each other."""
        if self.stream_options is not None and not self.stream:
            raise HttpError(400, "stream_options: expected stream beside it", "stream_options")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self) -> dict[str, Any]:
        """Those of `chat` and `complete`, which know them by the same names."""
        options = self._named(*_OPTIONS)
        if self.max_answer_tokens is not None:
            options["max_new_tokens"] = self.max_answer_tokens
        if self.logit_bias is not None:
            options["logit_bias"] = {_token(key): value for key, value in self.logit_bias.items()}
        return options

    def _named(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "prompt_lookup_num_tokens",
    "skip_special_tokens",
    "response_format",
    "regex",
    "grammar",
)


class ChatCompletion(Asked):
    """POST /v1/chat/completions"""

    messages: Objects
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_vision_id: StrictBool | None = None

    @property
    def max_answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def require_consistent(self) -> None:
        super().require_consistent()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise HttpError(400, "max_tokens: expected it or max_completion_tokens", "max_tokens")
        if self.parallel_tool_calls is False and self.tools:
            message = "parallel_tool_calls: expected true: one call alone cannot be promised"
            raise HttpError(400, message, "parallel_tool_calls")

    def options(self) -> dict[str, Any]:
        names = ("logprobs", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs", "add_vision_id")
        return super().options() | self._named(*names)


class Completion(Asked):
    """POST /v1/completions: texts or tokens, continued as they are."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    logprobs: StrictInt | None = None
    echo: StrictBool = False
    ignore_eos: StrictBool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and self.prompt and isinstance(self.prompt[0], (str, list))
        prompts: list[Any] = self.prompt if several else [self.prompt]  # type: ignore[assignment]
        return prompts

    def require_consistent(self) -> None:
        super().require_consistent()
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise HttpError(400, f"prompt: expected at most {MAX_PROMPTS}", "prompt")
        if self.echo and self.logprobs is not None:
            raise HttpError(400, "echo: a prompt's log-probabilities are not computed", "echo")

    def options(self) -> dict[str, Any]:
        options = super().options() | self._named("ignore_eos")
        if self.logprobs is not None:
            options |= {"logprobs": True, "top_logprobs": self.logprobs}
        return options


class Tokenize(Body):
    """POST /tokenize: a text, or a conversation's prompt."""

    prompt: StrictStr | None = None
    messages: Objects | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_vision_id: StrictBool = False


class Detokenize(Body):
    """POST /detokenize"""

    tokens: list[StrictInt]


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], data: bytes) -> AnyBody:
    """A body of JSON. HttpError 400 for what is none, pydantic's ValidationError for other forms."""
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise HttpError(400, "the body's JSON is too deep") from None
    except ValueError as error:
        raise HttpError(400, f"expected JSON: {error}") from None
    if not isinstance(found, Mapping):
        raise HttpError(400, f"expected a JSON object, found {type(found).__name__}")
    # What is null has not been said, whatever its name.
    return kind.model_validate({key: value for key, value in found.items() if value is not None})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _token(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise HttpError(400, f"logit_bias: expected token ids as keys, found {key[:40]!r}", "logit_bias")
    return int(key)
