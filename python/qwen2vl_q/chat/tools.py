"""Tools: what a model may call, how it is told of them, and how its calls are read.

Functions are described, and calls written, as in the OpenAI API. A template with a variable `tools` tells the
model in its own way; others get the form that the Qwen family was trained on (Hermes): JSON in <tools> of the
system prompt, calls in <tool_call>, results in <tool_response>. Calls are read in that form from any model.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.json_values import json_value
from qwen2vl_q.chat.messages import Message, TextPart, ToolCall
from qwen2vl_q.text.text_stream import overlap
from qwen2vl_q.text.tokenizer import TOOL_CALL_TOKENS

OPEN, CLOSE = TOOL_CALL_TOKENS
MAX_TOOLS = 128  # OpenAI's
DEFAULT_SYSTEM = "You are a helpful assistant."

# Qwen/Qwen2.5-7B-Instruct, tokenizer_config.json, chat_template
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{definitions}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """Functions, and whether they may or have to be called: one of them by `name`, any, or none."""

    definitions: Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name": ..., ...}}
    choice: Literal["auto", "required", "named"] = "auto"
    name: str = ""

    @classmethod
    def of(cls, tools: Any, choice: Any = None) -> Tools | None:
        """From `tools` and `tool_choice`; None where nothing may be called. ValueError for other forms."""
        if not isinstance(tools, list | tuple | None):
            raise ValueError(f"tools: expected a list of functions, found {type(tools).__name__}")
        if tools and len(tools) > MAX_TOOLS:
            raise ValueError(f"tools: expected at most {MAX_TOOLS}, found {len(tools)}")
        found = cls([_definition(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())])
        names = [definition["function"]["name"] for definition in found.definitions]
        if len(set(names)) < len(names):
            raise ValueError(f"tools: expected different names, found {printable(names)}")
        if choice not in (None, "none", "auto", "required"):
            found = replace(found, choice="named", name=_named(choice, names))
        elif choice == "required":
            found = replace(found, choice="required")
        if not names and choice in ("auto", "required"):
            raise ValueError(f"tool_choice: {choice} without tools")
        return found if names and choice != "none" else None

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """Those that may be called."""
        functions = [definition["function"] for definition in self.definitions]
        return [f for f in functions if self.choice != "named" or f["name"] == self.name]

    @property
    def instructions(self) -> str:
        """Of the system prompt."""
        lines = [json.dumps(definition, ensure_ascii=False) for definition in self.definitions]
        return _INSTRUCTIONS.format(definitions="\n".join(lines))


def _definition(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        raise ValueError(
            f'{where}: expected {{"type": "function", "function": ...}}, found {printable(tool)}'
        )
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{where}: expected a function with a name, found {printable(function)}")
    for key, kind, expected in (("description", str, "text"), ("parameters", Mapping, "a JSON schema")):
        if not isinstance(function.get(key), kind | None):
            raise ValueError(f"{where}: expected {expected} as {key}, found {printable(function[key])}")
    for found, known in ((tool, {"type", "function"}), (function, _FUNCTION_KEYS)):
        if unknown := found.keys() - known:
            raise ValueError(f"{where}: unknown key {printable(min(map(str, unknown)))}")
    kept = {key: function[key] for key in _FUNCTION_KEYS if function.get(key) is not None}
    return {"type": "function", "function": json_value(where, kept)}


_FUNCTION_KEYS = {"name": 0, "description": 1, "parameters": 2, "strict": 3}.keys()


def _named(choice: Any, names: Sequence[str]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise ValueError(
            "tool_choice: expected none, auto, required or "
            f'{{"type": "function", "function": {{"name": one of the tools}}}}, found {printable(choice)}'
        )
    return str(name)


# --- what a template without tools is told ---


def as_text(conversation: Sequence[Message], tools: Tools | None) -> list[Message]:
    """The conversation with tools, calls and results as text of the roles that every template knows."""
    messages: list[Message] = []
    for message in conversation:
        if message.role == "tool":
            result = f"<tool_response>\n{message.text}\n</tool_response>"
            if messages and messages[-1].tool_call_id is not None:
                before = messages.pop()
                result = f"{before.content}\n{result}"
            messages.append(Message("user", result, tool_call_id=message.tool_call_id or ""))
        elif message.tool_calls:
            calls = [written(call) for call in message.tool_calls]
            said = [message.text] if message.text else []
            messages.append(Message("assistant", "\n".join(said + calls)))
        else:
            messages.append(message)
    if tools is None:
        return messages
    if messages[0].role != "system":
        messages.insert(0, Message("system", DEFAULT_SYSTEM))
    system = messages[0]
    instructions = f"\n\n{tools.instructions}"
    content = (
        system.content + instructions
        if isinstance(system.content, str)
        else (*system.content, TextPart(instructions))
    )
    messages[0] = replace(system, content=content)
    return messages


def written(call: ToolCall) -> str:
    """As the model writes it. Its texts hold no marker: `<` is escaped where one would be."""
    name = json.dumps(call.name, ensure_ascii=False)
    body = f'{{"name": {name}, "arguments": {json.dumps(call.parsed, ensure_ascii=False)}}}'
    if OPEN in body or CLOSE in body:
        body = body.replace("<", "\\u003c")
    return f"{OPEN}\n{body}\n{CLOSE}"


# --- what the model says ---


@dataclass
class CallReader:
    """Takes calls out of a text as it comes. What is no call of a known function stays text."""

    names: frozenset[str]
    _held: str = ""
    _called: bool = field(default=False, init=False)

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """The text that is certain, and the calls that are whole, after some more."""
        self._held += text
        said: list[str] = []
        calls: list[ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            end = self._held.find(CLOSE, start)
            if end < 0:
                break
            before, body = self._held[:start], self._held[start + len(OPEN) : end]
            self._held = self._held[end + len(CLOSE) :]
            call = _read(body, self.names)
            if call is None:
                said.append(f"{before}{OPEN}{body}{CLOSE}")
            else:
                said.append(before.rstrip())
                calls.append(call)
                self._called = True
        certain = start if start >= 0 else len(self._held) - overlap(self._held, OPEN)
        certain = len(self._held[:certain].rstrip())  # white space before a call is none of the text
        said.append(self._held[:certain])
        self._held = self._held[certain:]
        return "".join(said), tuple(calls)

    def finish(self) -> str:
        """The rest, which has become no call."""
        rest, self._held = self._held, ""
        return "" if self._called and not rest.strip() else rest


def _read(body: str, names: frozenset[str]) -> ToolCall | None:
    try:
        found = json.loads(body)
        name, arguments = found["name"], found.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if name in names and isinstance(arguments, dict):
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False), f"call_{secrets.token_hex(12)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None
