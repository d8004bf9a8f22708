"""Answers of a given form: JSON schemas, regular expressions, grammars and forced calls, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import Qwen2VLError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.json_values import json_value
from qwen2vl_q.chat.tools import CLOSE, OPEN, Tools
from qwen2vl_q.engine.options import AnswerOptions
from qwen2vl_q.engine.request import Constraint
from qwen2vl_q.text.tokenizer import Tokenizer

MAX_FORM_CHARS = 65536  # of a schema or grammar as text; llguidance reads so much in a second or two
# Between JSON's tokens: room for indentation, but not for an answer of nothing else.
_WHITE_SPACE = r"[ \t\n\r]{0,32}"
_FORMATS = ("text", "json_object", "json_schema")


@dataclass(frozen=True)
class Form:
    """What an answer has to be."""

    option: str  # that asks for it, for messages
    text: str
    kind: Literal["lark", "regex"] = "lark"


def form_of(options: AnswerOptions, tools: Tools | None) -> Form | None:
    """The one that options ask for. ValueError for several, for what is none, and for one too large."""
    forms = [form for form in (*_asked(options), _of_calls(tools)) if form is not None]
    names = [form.option for form in forms] + (["constraint"] if options.get("constraint") else [])
    if tools is not None and tools.choice == "auto" and forms:
        names.append("tools")
    if len(names) > 1:
        raise ValueError(f"expected one of {', '.join(names)}")
    if not forms:
        return None
    [form] = forms
    if len(form.text) > MAX_FORM_CHARS:
        raise ValueError(
            f"{form.option}: expected at most {MAX_FORM_CHARS} characters, found {len(form.text)}"
        )
    return form


def _asked(options: AnswerOptions) -> list[Form | None]:
    forms = [_of_response_format(options.get("response_format"))]
    kinds: tuple[tuple[Literal["regex", "grammar"], Literal["regex", "lark"]], ...] = (
        ("regex", "regex"),
        ("grammar", "lark"),
    )
    for option, kind in kinds:
        text = options.get(option)
        if text is not None and not (isinstance(text, str) and text):
            raise ValueError(f"{option}: expected a text, found {printable(text)}")
        forms.append(None if text is None else Form(option, text, kind))
    return forms


def _of_response_format(asked: Any) -> Form | None:
    if asked is None:
        return None
    kind = asked.get("type") if isinstance(asked, Mapping) else None
    if kind not in _FORMATS:
        raise ValueError(
            f"response_format: expected a type of {', '.join(_FORMATS)}, found {printable(asked)}"
        )
    _require_keys(asked, {"type", "json_schema"} if kind == "json_schema" else {"type"})
    if kind == "text":
        return None
    schema: Any = {"type": "object"}
    if kind == "json_schema":
        described = asked.get("json_schema")
        if not isinstance(described, Mapping) or "schema" not in described:
            raise ValueError(
                f'response_format: expected json_schema as {{"schema": ...}}, found {printable(described)}'
            )
        _require_keys(described, {"name", "description", "schema", "strict"})
        schema = described["schema"]
    return Form("response_format", f"start: {_json('response_format: schema', schema)}")


def _require_keys(found: Mapping[str, Any], known: set[str]) -> None:
    if unknown := found.keys() - known:
        raise ValueError(f"response_format: unknown key {printable(min(map(str, unknown)))}")


def _json(where: str, schema: Any) -> str:
    """A schema in a grammar."""
    if not isinstance(schema, (bool, Mapping)):
        raise ValueError(f"{where}: expected an object, found {printable(schema)}")
    checked = json_value(where, schema)
    if isinstance(checked, dict):
        own = checked.get("x-guidance")
        if own is not None:
            raise ValueError(f"{where}: unknown key x-guidance")
        checked["x-guidance"] = {"whitespace_pattern": _WHITE_SPACE, "lenient": False}
    try:
        return f"%json {json.dumps(checked, allow_nan=False)}"
    except ValueError:
        raise ValueError(f"{where}: expected finite numbers") from None


def _of_calls(tools: Tools | None) -> Form | None:
    """Of calls that have to be made: one of a named function, some of any."""
    if tools is None or tools.choice == "auto":
        return None
    lines = ["start: call" if tools.choice == "named" else r'start: call ("\n" call)*']
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools.functions))))
    for i, function in enumerate(tools.functions):
        name = function["name"]
        head = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        schema = function.get("parameters") or {"type": "object"}
        lines.append(f'call_{i}: OPEN {head} arguments_{i} "}}\\n" CLOSE')
        lines.append(f"arguments_{i}: {_json(f'tools: {printable(name)}: parameters', schema)}")
    return Form("tool_choice", "\n".join(lines))


class Grammars:
    """Makes constraints for one tokenizer. UnsupportedError where llguidance is not installed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise UnsupportedError(
                "structured answers need llguidance: pip install 'qwen2vl-q[structured]'"
            ) from None
        self._matcher = llguidance.LLMatcher
        self._special = tokenizer.special_tokens
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)),
            eos_token=list(tokenizer.eos_token_ids),
        )

    def constraints(self, form: Form) -> Callable[[], Constraint]:
        """Makes one for each answer. ValueError for a form that cannot be read, or that nothing fits."""
        text = form.text
        for name, marker in (("OPEN", OPEN), ("CLOSE", CLOSE)) if form.option == "tool_choice" else ():
            text += f"\n{name}: {marker if marker in self._special else json.dumps(marker)}"
        read = self._matcher.grammar_from_lark if form.kind == "lark" else self._matcher.grammar_from_regex
        matcher = self._matcher(self._tokenizer, read(text), log_level=0)
        if not matcher.is_error():
            allowed = matcher.compute_logit_bias()
            if not matcher.is_error() and not any(allowed):
                raise ValueError(f"{form.option}: no answer fits")
        if matcher.is_error():
            raise ValueError(f"{form.option}: {_reason(matcher)}")
        return lambda: _Matched(form.option, matcher.deep_copy())


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eos_token_ids[0]
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer))]
        self.tokens += [b""] * (vocab_size - len(tokenizer))  # rows that stand for nothing
        self.special_token_ids = sorted(tokenizer.special_tokens.values())
        self._encode = tokenizer.encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode("utf-8", errors="replace"))


class _Matched:
    def __init__(self, option: str, matcher: Any) -> None:
        self._option = option
        self._matcher = matcher

    def allowed(self) -> NDArray[np.uint8]:
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        self._check()
        return allowed

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def forced(self) -> list[int]:
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            raise Qwen2VLError(f"{self._option}: {_reason(self._matcher)}")


def _reason(matcher: Any) -> str:
    return printable(" ".join(matcher.get_error().split()), 400)
