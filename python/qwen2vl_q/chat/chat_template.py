"""The file's chat template: a conversation's texts in the frame of special tokens.

Only the template can write special tokens. While it is rendered, each that stands in its source is a single
character that no text can hold (half a surrogate pair). Whatever the template does with a message's text,
cuts it, replaces in it or puts it together anew, that stays text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.exceptions import SecurityError

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.json_values import json_value
from qwen2vl_q.chat.template_sandbox import METER, Environment, Meter, weight
from qwen2vl_q.text.tokenizer import ANSWER_TOKENS, MAX_SPECIAL_TOKENS, any_of, require_characters

# Qwen/Qwen2-VL-2B-Instruct, chat_template.json
DEFAULT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MAX_TEMPLATE_CHARS = 256 * 1024  # published templates, tools and all, stay under 20 KiB
MAX_ADDED_CHARS = 256 * 1024  # what a template may write beside the messages' own text
# What rendering may take, in characters handled (`template_sandbox`): a second or two, half a gigabyte. The
# released template handles each character of a message some five times.
MAX_WORK = 2**25
MAX_WORK_PER_CHAR = 64
MAX_VARIABLES_WEIGHT = 2**20  # of a caller's variables (`template_sandbox.weight`: characters, and 8 an item)

_FIRST_HALF = 0xD800
assert MAX_SPECIAL_TOKENS <= 0xE000 - _FIRST_HALF
_HALVES = re.compile("([\ud800-\udfff])")


class ChatTemplate:
    """One compiled template. `name` begins the message of every error."""

    def __init__(
        self,
        source: str = DEFAULT_TEMPLATE,
        name: str = "default chat template",
        special_tokens: Collection[str] = (),
    ) -> None:
        """special_tokens: those of the tokenizer, which the template may write.

        FormatError where the source is too long or not a template.
        """
        self.source = source
        self._name = name
        self._special = list(special_tokens)
        self._half_of = {token: chr(_FIRST_HALF + i) for i, token in enumerate(self._special)}
        self._in_source = re.compile(any_of(self._special))
        self._in_answers = re.compile(any_of(ANSWER_TOKENS & self._half_of.keys()))
        if len(source) > MAX_TEMPLATE_CHARS:
            raise FormatError(
                f"{name}: expected at most {MAX_TEMPLATE_CHARS} characters, found {len(source)}"
            )
        environment = Environment()
        environment.globals["raise_exception"] = _raise_exception
        self._reserved = {*_OWN_VARIABLES, *environment.globals}
        try:
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
            self._template = environment.compile_template(source, self._halved(self._in_source))
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(f"{name}: line {error.lineno}: {printable(error.message)}") from None
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise FormatError(f"{name}: not a template: {printable(str(error))}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[tuple[str, bool]]:
        """The conversation as pieces (text, is_special): special tokens by name, and the texts between them.

        In the assistant's contents the markers of found objects and of calls are tokens as well: the model
        wrote them.
        `variables` are further ones of the template, of JSON's kinds; their texts stay text. ValueError for
        what the template refuses (raise_exception), half a surrogate pair in a text, and variables of other
        names or kinds; FormatError where the template fails or takes too much time or memory.
        """
        halved = [_mapped(message, str) for message in messages]
        for message in halved:
            if message["role"] == "assistant":
                message["content"] = _mapped(message["content"], self._halved(self._in_answers))
        own = self._checked(variables or {})
        size = weight(halved) + weight(own)
        longest = MAX_ADDED_CHARS + 2 * size
        running = METER.set(Meter(MAX_WORK + MAX_WORK_PER_CHAR * size, longest))
        chunks: list[str] = []
        length = 0
        try:
            for chunk in self._template.generate(
                own,
                messages=halved,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
                bos_token="",
                eos_token=self._halved(self._in_source)("<|im_end|>"),
            ):
                chunks.append(chunk)
                length += len(chunk)
                if length > longest:
                    raise SecurityError(f"more than {longest} characters of output")
        except _RefusedError as error:
            raise ValueError(f"{self._name}: {self._shown(error)}") from None
        except MemoryError:
            raise
        except Exception as error:  # a template's code fails as Python's own does: TypeError, KeyError, ...
            raise FormatError(f"{self._name}: {self._shown(error)}") from error
        finally:
            METER.reset(running)
        return self._pieces("".join(chunks))

    def _checked(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a caller's variables."""
        for name in variables:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"template variable: expected a name, found {printable(repr(name))}")
            if name in self._reserved:
                raise ValueError(f"template variable: '{name}' is the template's own")
        copied = {name: json_value(f"template variable '{name}'", value) for name, value in variables.items()}
        total = weight(copied)
        if total > MAX_VARIABLES_WEIGHT:
            raise ValueError(
                f"template variables: expected at most {MAX_VARIABLES_WEIGHT} characters, found {total}"
            )
        return copied

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        pieces = []
        for i, piece in enumerate(_HALVES.split(text)):
            if i % 2 == 0:
                pieces.append((piece, False))
                continue
            token = ord(piece) - _FIRST_HALF
            if token >= len(self._special):
                raise FormatError(f"{self._name}: the template writes half a surrogate pair")
            pieces.append((self._special[token], True))
        return [(piece, is_special) for piece, is_special in pieces if piece]

    def _halved(self, tokens: re.Pattern[str]) -> Callable[[str], str]:
        """Puts its half in every token's place."""
        return lambda text: tokens.sub(lambda match: self._half_of[match.group()], text)

    def _shown(self, error: Exception) -> str:
        tokens = dict(zip(self._half_of.values(), self._special, strict=True))
        text = _HALVES.sub(lambda match: tokens.get(match.group(), match.group()), str(error))
        return printable(text or type(error).__name__)


_OWN_VARIABLES = ("messages", "add_generation_prompt", "add_vision_id", "bos_token", "eos_token")


class _RefusedError(Exception):
    """Raised by a template's call of raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _mapped(value: Any, write: Callable[[str], str]) -> Any:
    """A copy of a message, `write` applied to its texts."""
    if isinstance(value, str):
        require_characters(value)
        return write(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, write) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, write) for item in value]
    return value
