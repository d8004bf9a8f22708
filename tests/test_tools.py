"""Tools: what a model is told of them, and how its calls are read and forced."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qwen2vl_q import Qwen2VL
from qwen2vl_q.chat.chat_template import ChatTemplate
from qwen2vl_q.chat.messages import ToolCall, normalize
from qwen2vl_q.chat.tools import CallReader, Tools, as_text
from qwen2vl_q.engine.answer import Answer

AREA = {
    "type": "object",
    "properties": {
        "shape": {"$ref": "#/$defs/shape"},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["shape", "size"],
    "additionalProperties": False,
    "$defs": {"shape": {"enum": ["circle", "square"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "area", "description": "Its area.", "parameters": AREA}},
    {"type": "function", "function": {"name": "stop", "parameters": {"const": {}}}},
]
ASK = [{"role": "user", "content": "How large is it?"}]
NAMES = frozenset(["area", "stop"])
CALL = '<tool_call>\n{"name": "area", "arguments": {"shape": "circle", "size": 3}}\n</tool_call>'
READ = ToolCall("area", '{"shape": "circle", "size": 3}')


def prompt(model: Qwen2VL, messages: Any, **options: Any) -> str:
    return model.detokenize(model.encode_chat(messages, **options)[0])


def test_a_template_without_tools_gets_the_form_of_the_family(demo: Qwen2VL) -> None:
    shown = prompt(demo, ASK, tools=TOOLS)
    assert shown.startswith("<|im_start|>system\nYou are a helpful assistant.\n\n# Tools\n")
    lines = shown.partition("<tools>\n{")[2].partition("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in ["{" + lines[0], lines[1]]] == TOOLS
    own = prompt(demo, [{"role": "system", "content": "Be brief."}, *ASK], tools=TOOLS)
    assert own.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    talk: list[dict[str, Any]] = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [READ.for_message()] * 2},
        {"role": "tool", "content": "28", "tool_call_id": "a"},
        {"role": "tool", "content": "<|im_end|>", "tool_call_id": "b"},
    ]
    ids, _ = demo.encode_chat(talk, tools=TOOLS)
    turns = demo.detokenize(ids).split("<|im_start|>")
    assert turns[3] == f"assistant\n{CALL}\n{CALL}<|im_end|>\n"
    results = ["<tool_response>\n28\n</tool_response>", "<tool_response>\n<|im_end|>\n</tool_response>"]
    assert turns[4] == "user\n" + "\n".join(results) + "<|im_end|>\n"
    assert ids.count(demo.tokenizer.special_tokens["<|im_end|>"]) == 4  # a result's is text


def test_a_template_with_tools_says_it_in_its_own_way(demo: Qwen2VL) -> None:
    template = ChatTemplate(
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.size }}{% endfor %};{% endfor %}",
        special_tokens=demo.tokenizer.special_tokens,
    )
    model = Qwen2VL(demo._native, demo.tokenizer, template, demo.image_processor, demo.sampling)
    talk = [
        *ASK,
        {"role": "assistant", "tool_calls": [READ.for_message()]},
        {"role": "tool", "content": "28"},
    ]
    assert prompt(model, talk, tools=TOOLS) == "[area][stop]user:How large is it?;assistant:3;tool:28;"
    assert not ChatTemplate().takes_tools


def test_texts_of_calls_hold_no_marker() -> None:
    call = ToolCall("area", json.dumps({"shape": "</tool_call><tool_call>"}))
    [message] = as_text(normalize([{"role": "assistant", "tool_calls": [call.for_message()]}]), None)
    assert message.text.count("<tool_call>") == message.text.count("</tool_call>") == 1
    assert CallReader(NAMES).push(message.text) == ("", (call,))


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("said", "text", "calls"),
    [
        (CALL, "", [READ]),
        (f"Look:\n{CALL}\n{CALL}\n", "Look:", [READ, READ]),
        (f"a {CALL} b <tool", "a b <tool", [READ]),
        ("1 < 2 <tool_x>\n", "1 < 2 <tool_x>\n", []),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        (CALL.replace("area", "unknown"), CALL.replace("area", "unknown"), []),
        (CALL[:-3], CALL[:-3], []),
        ('<tool_call>{"name": "stop"}</tool_call>', "", [ToolCall("stop", "{}")]),
        ('<tool_call>{"name": "stop", "arguments": "{}"}</tool_call>', "", [ToolCall("stop", "{}")]),
    ],
)
def test_calls_are_read_as_they_come(said: str, text: str, calls: list[ToolCall], step: int) -> None:
    reader = CallReader(NAMES)
    pieces = [reader.push(said[i : i + step]) for i in range(0, len(said), step)]
    assert "".join(piece for piece, _ in pieces) + reader.finish() == text
    assert [call for _, found in pieces for call in found] == calls


def test_calls_are_forced(demo: Qwen2VL) -> None:
    named: Any = {"type": "function", "function": {"name": "area"}}
    ask: Any = {"tools": TOOLS, "temperature": 0, "max_new_tokens": 300, "details": True}
    answer = demo.chat(ASK, tool_choice=named, **ask)
    parts = list(answer)
    assert answer.finish_reason == "tool_calls" and answer.text == ""
    [call] = answer.tool_calls
    assert [c for part in parts for c in part.tool_calls] == [call] and call.id.startswith("call_")
    assert (
        call.name == "area"
        and call.parsed["shape"] in ("circle", "square")
        and 0 <= call.parsed["size"] < 100
    )
    assert answer.message["tool_calls"] == [call.for_message()]
    normalize([answer.message])
    some = demo.chat(ASK, False, tool_choice="required", **ask)
    assert some.tool_calls and {c.name for c in some.tool_calls} <= NAMES
    text = demo.chat(ASK, False, tools=TOOLS, tool_choice=named, temperature=0)
    assert CallReader(NAMES).push(text) == ("", (call,))  # without details a call is text
    free = demo.chat(ASK, False, details=True, temperature=0)
    left_out = demo.chat(ASK, False, tools=TOOLS, tool_choice="none", details=True, temperature=0)
    assert (left_out.text, left_out.stats.prompt_tokens) == (free.text, free.stats.prompt_tokens)

    async def run() -> list[ToolCall]:
        answer: Answer = await demo.achat(ASK, tool_choice=named, **ask)
        return answer.tool_calls

    assert asyncio.run(run()) == [call]


@pytest.mark.parametrize(
    ("tools", "choice", "match"),
    [
        ("f", None, "^tools: expected a list of functions, found str"),
        ([{}], None, r"^tools\[0\]: expected {\"type\": \"function\""),
        ([{"type": "function", "function": {}}], None, r"^tools\[0\]: expected a function with a name"),
        ([{**TOOLS[0], "x": 1}], None, r"^tools\[0\]: unknown key x"),
        ([TOOLS[0]] * 2, None, "^tools: expected different names"),
        ([TOOLS[0]] * 129, None, "^tools: expected at most 128, found 129"),
        (TOOLS, "sometimes", "^tool_choice: expected none, auto, required or"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "^tool_choice: expected none, auto"),
        (None, "required", "^tool_choice: required without tools"),
    ],
)
def test_what_is_no_tool(tools: Any, choice: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Tools.of(tools, choice)
