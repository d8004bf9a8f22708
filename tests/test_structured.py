"""Answers of a given form, from a model that would say something else."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jsonschema
import pytest

from at_once import beside, conversation
from qwen2vl_q import DEMO_MODEL, Qwen2VL, Qwen2VLError, UnsupportedError
from qwen2vl_q.engine.structured import MAX_FORM_CHARS, Form, Grammars
from qwen2vl_q.text.tokenizer import Tokenizer
from structured_cases import random_schema, schema_format

WHAT, READ, COUNT, BOX = 0, 1, 2, 3  # seeds of at_once.conversation
SAY = [{"role": "user", "content": "Who are you?"}]


def test_answers_validate(demo: Qwen2VL) -> None:
    """200 random schemas, greedy and hot; what max_new_tokens cuts is told so."""
    rng = random.Random(5)
    cut = 0
    for i in range(200):
        schema = random_schema(rng)
        asked: Any = {"response_format": schema_format(schema), "max_new_tokens": 150}
        answer = demo.chat(SAY, False, details=True, temperature=i % 3 * 0.7, seed=i, **asked)
        if answer.finish_reason == "length":
            cut += 1
            continue
        assert answer.finish_reason == "stop"
        try:
            jsonschema.validate(json.loads(answer.text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"{schema}: {answer.text!r}: {error}")
    assert cut <= 40


def test_right_answers_in_json(demo: Qwen2VL) -> None:
    """The model knows how many there are; the schema only says how to write it."""
    talk = conversation(COUNT)
    said = demo.chat(talk, False, temperature=0)
    number = int(said.split()[0])
    schema = {"type": "integer", "minimum": 0, "maximum": 9}
    ask: Any = {"temperature": 0, "response_format": schema_format(schema)}
    found = beside(
        *[partial(demo.chat, talk, False, **ask)] * 3, partial(demo.chat, talk, False, temperature=0)
    )
    assert found == [str(number)] * 3 + [said]
    assert demo.chat(talk, False, temperature=0, regex=r"[0-9] shapes?\.") == f"{number} shapes."
    assert demo.chat(talk, False, temperature=0, regex=r"No\.|Yes, [a-z]{3}/\d") != said
    grammar = 'start: "<" NUMBER ">"\nNUMBER: /[0-9]/'
    digit = demo.chat(talk, False, temperature=0, grammar=grammar)
    assert re.fullmatch(r"<\d>", digit)
    assert demo.chat(talk, False, n=2, temperature=0, grammar=grammar) == [digit] * 2
    assert demo.chat(talk, False, temperature=0, response_format={"type": "text"}, regex=None) == said


def test_any_object(demo: Qwen2VL) -> None:
    [end] = demo.tokenize("}")  # which the model would never say
    ask: Any = {"response_format": {"type": "json_object"}, "max_new_tokens": 200, "logit_bias": {end: 12}}
    complete = 0
    for seed in range(8):
        answer = demo.chat(conversation(WHAT), False, details=True, temperature=1.0, seed=seed, **ask)
        if answer.finish_reason == "stop":
            complete += 1
            assert isinstance(json.loads(answer.text), dict)
        assert answer.text.startswith("{")
    assert complete


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
        (False, "Unsatisfiable schema"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema: incompatible types"),
        ({"not": {}}, r"Unimplemented keys: \[\"not\"\]"),
        ({"$ref": "http://example.org/x"}, "does not fetch resources"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"x-guidance": {"lenient": True}}, "schema: unknown key x-guidance"),
        ([], r"schema: expected an object, found \[\]"),
        ({"const": float("nan")}, "schema: expected finite numbers"),
        ({"const": "\ud800"}, "half a surrogate pair"),
        ({"enum": ["x" * 100] * 700}, f"expected at most {MAX_FORM_CHARS} characters, found 7"),
    ],
)
def test_schemas_that_no_answer_can_have(
    demo: Qwen2VL, rows: list[list[int]], schema: Any, match: str
) -> None:
    """Before the picture is looked at."""
    with pytest.raises(ValueError, match=match) as caught:
        demo.chat(
            [{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}],
            response_format=schema_format(schema),
        )
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert not rows


def test_a_deep_schema_is_refused(demo: Qwen2VL) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(2000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="schema: more than 30 lists in one another"):
        demo.chat(SAY, response_format=schema_format(schema))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"response_format": "json"}, "^response_format: expected a type of text, json_object, json_schema"),
        ({"response_format": {"type": "xml"}}, "^response_format: expected a type of .*xml"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "unknown key schema$"),
        (
            {"response_format": {"type": "json_schema"}},
            "expected json_schema as .* found None",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
            "unknown key x$",
        ),
        ({"regex": ""}, "^regex: expected a text, found "),
        ({"regex": "("}, "^regex: .*unclosed group"),
        ({"grammar": 3}, "^grammar: expected a text, found 3"),
        ({"grammar": "start: rule"}, "^grammar: .*rule"),
        ({"grammar": "x" * (MAX_FORM_CHARS + 1)}, f"^grammar: expected at most {MAX_FORM_CHARS} characters"),
        ({"regex": "a", "grammar": 'start: "a"'}, "^expected one of regex, grammar$"),
        ({"regex": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}, "one of regex, tools$"),
    ],
)
def test_forms_that_cannot_be_read(demo: Qwen2VL, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        demo.chat(SAY, **options)


def test_what_goes_wrong_on_the_way_ends_the_call(demo: Qwen2VL) -> None:
    constraint = Grammars(demo.tokenizer, demo.config.vocab_size).constraints(Form("regex", "ab", "regex"))()
    [c] = demo.tokenize("c")
    with pytest.raises(Qwen2VLError, match=r"^regex: .+"):
        constraint.accept(c)


def test_it_is_an_extra(monkeypatch: pytest.MonkeyPatch, demo: Qwen2VL) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'qwen2vl-q\[structured\]'"):
        demo.chat(SAY, regex="a")
    code = f"""
import sys
from qwen2vl_q import Qwen2VL
model = Qwen2VL.from_gguf({str(DEMO_MODEL)!r}, 1)
model.chat([{{"role": "user", "content": "a"}}], False, max_new_tokens=2)
assert "llguidance" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_vocabulary_may_be_larger_than_the_tokenizer_s(demo: Qwen2VL) -> None:
    tokenizer: Tokenizer = demo.tokenizer
    allowed = Grammars(tokenizer, len(tokenizer) + 64).constraints(Form("regex", "[ab]", "regex"))().allowed()
    assert allowed is not None and len(allowed) == len(tokenizer) + 64
    assert {tokenizer.token_bytes(i) for i in allowed.nonzero()[0].tolist()} == {b"a", b"b"}
