"""The file's chat template, rendered in jinja2's sandbox.

What a template writes and what a message says are kept apart through rendering, so that only the template can
write special tokens: see `ChatTemplate.render`.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwen2vl_q.errors import FormatError

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

TEMPLATE = "template"  # the author of a piece that no message's author wrote


# What makes a large text of a small one at one call.
_PADDING_METHODS = frozenset(["center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"])
_PADDING_FILTERS = ("batch", "center", "format", "indent", "slice", "wordwrap", "xmlattr")


class _Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, less the operators and methods that make large values of small ones."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        padding = isinstance(obj, str) and attr in _PADDING_METHODS
        return not padding and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed str.format either: its field widths are free. `is_safe_attribute` refuses it then."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not all(isinstance(side, (int, float)) and abs(side) < 2**31 for side in (left, right)):
            raise SecurityError(f"operator {operator!r} on other things than small numbers")
        if operator == "**" and abs(right) > 64:
            raise SecurityError(f"power {right}")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template. `name` begins the message of every error."""

    def __init__(self, source: str = DEFAULT_TEMPLATE, name: str = "default chat template") -> None:
        """FormatError where the source is too long or not a template."""
        self.source = source
        self._name = name
        if len(source) > MAX_TEMPLATE_CHARS:
            raise FormatError(
                f"{name}: expected at most {MAX_TEMPLATE_CHARS} characters, found {len(source)}"
            )
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        for name_of_filter in _PADDING_FILTERS:
            del environment.filters[name_of_filter]
        del environment.globals["lipsum"]
        environment.globals["raise_exception"] = _raise_exception
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(f"{name}: line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
            raise FormatError(f"{name}: not a template: {error}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
    ) -> list[tuple[str, str]]:
        """The rendered conversation as pieces (text, author): a message's role for that message's text,
        TEMPLATE for what the template wrote.

        Texts are the strings under "content" and "text". They are rendered between marks drawn at random for
        this call, which nobody can have written; white space at a text's ends stays outside of them, so that
        a template may trim it. Raises ValueError for what the template refuses (raise_exception), FormatError
        where it fails or does with the texts what leaves the marks in disorder.
        """
        mark = str(secrets.randbits(128))  # digits pass a template's filters unchanged
        authors = sorted({str(message["role"]) for message in messages})
        marked = [_mark(message, f"[{mark}:{authors.index(message['role'])}[") for message in messages]
        limit = MAX_ADDED_CHARS + 2 * _text_length(marked)
        chunks: list[str] = []
        length = 0
        try:
            for chunk in self._template.generate(
                messages=marked,
                add_generation_prompt=add_generation_prompt,
                add_vision_id=add_vision_id,
                bos_token="",
                eos_token="<|im_end|>",
            ):
                chunks.append(chunk)
                length += len(chunk)
                if length > limit:
                    raise SecurityError(f"more than {limit} characters of output")
        except _RefusedError as error:
            raise ValueError(f"{self._name}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # a template's code fails as Python's own does: TypeError, KeyError, ...
            raise FormatError(f"{self._name}: {error or type(error).__name__}") from error
        return self._pieces("".join(chunks), mark, authors)

    def _pieces(self, text: str, mark: str, authors: Sequence[str]) -> list[tuple[str, str]]:
        pieces: list[tuple[str, str]] = []
        author = TEMPLATE
        end = 0
        for match in re.finditer(rf"\[{mark}:(\d+)([\[\]])", text):
            pieces.append((text[end : match.start()], author))
            end = match.end()
            named, opens = authors[int(match[1])], match[2] == "["
            if (author == TEMPLATE) != opens or (not opens and named != author):
                raise FormatError(f"{self._name}: the template cuts the messages' texts apart")
            author = named if opens else TEMPLATE
        pieces.append((text[end:], author))
        if author != TEMPLATE or any(mark in piece or mark[::-1] in piece for piece, _ in pieces):
            raise FormatError(f"{self._name}: the template cuts the messages' texts apart")
        return [(piece, author) for piece, author in pieces if piece]


class _RefusedError(Exception):
    """Raised by a template's call of raise_exception."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Not jinja2's own filter, which escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _mark(value: Any, opening: str) -> Any:
    """A copy of a message with its texts between marks."""
    if isinstance(value, Mapping):
        return {
            key: _enclose(item, opening)
            if key in ("content", "text") and isinstance(item, str)
            else _mark(item, opening)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mark(item, opening) for item in value]
    return value


def _enclose(text: str, opening: str) -> str:
    body = text.strip()
    if not body:
        return text
    start = text.index(body)
    return f"{text[:start]}{opening}{body}{opening[:-1]}]{text[start + len(body) :]}"


def _text_length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_text_length(item) for item in value.values())
    return sum(_text_length(item) for item in value) if isinstance(value, list) else 0
