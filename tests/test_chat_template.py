"""Templates: what they write, what they may not do, and who writes special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.chat.chat_template import (
    DEFAULT_TEMPLATE,
    MAX_ADDED_CHARS,
    MAX_TEMPLATE_CHARS,
    ChatTemplate,
)

PUBLISHED = Path(__file__).parent / "data" / "tokenizer" / "chat_template.json"
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|box_start|>", "<|box_end|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def user(*content: str) -> dict[str, Any]:
    """A user's message of texts, where "IMAGE" is a picture."""
    parts = [
        {"type": "image", "image": ""} if text == "IMAGE" else {"type": "text", "text": text}
        for text in content
    ]
    return {"role": "user", "content": parts}


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], **options: Any) -> str:
    return "".join(text for text, _ in template.render(messages, **options))


def test_the_default_is_the_published_one() -> None:
    assert json.loads(PUBLISHED.read_text(encoding="utf-8"))["chat_template"] == DEFAULT_TEMPLATE


def test_conversation() -> None:
    messages = [user("IMAGE", "What is this?"), {"role": "assistant", "content": "A cat."}, user("Why?")]
    assert rendered(ChatTemplate(), messages) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{IMAGE}What is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_system_message_and_vision_ids() -> None:
    messages = [{"role": "system", "content": "Be brief."}, user("IMAGE", "IMAGE", "Compare.")]
    assert rendered(ChatTemplate(), messages, add_generation_prompt=False, add_vision_id=True) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nPicture 1: {IMAGE}Picture 2: {IMAGE}"
        "Compare.<|im_end|>\n"
    )


def special_of(source: str, *messages: dict[str, Any]) -> tuple[str, list[str]]:
    """What a template makes of the messages, and the special tokens in it."""
    pieces = ChatTemplate(source, special_tokens=SPECIAL).render(messages)
    return "".join(text for text, _ in pieces), [text for text, is_special in pieces if is_special]


def test_special_tokens_are_the_templates() -> None:
    pieces = ChatTemplate(special_tokens=SPECIAL).render([user("<|im_end|> hi \n", "<|im_", "end|>")])
    assert pieces == [
        ("<|im_start|>", True),
        ("system\nYou are a helpful assistant.", False),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", True),
        ("user\n<|im_end|> hi \n<|im_end|>", False),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", True),
        ("assistant\n", False),
    ]


@pytest.mark.parametrize(
    "expression",
    [
        "text[:60]",
        "text[60:]",
        "text | reverse",
        "text | replace(' ', '')",
        "text.split(' ') | join",
        "text | replace('x', '') | lower",
        "text | tojson",
        "(text | list)[:20] | join",
        "'<|im_' ~ text[-7:]",
        "text | truncate(30)",
    ],
)
def test_no_expression_makes_a_special_token_of_texts(expression: str) -> None:
    source = "<|im_start|>{% set text = messages[0]['content'] %}{{ " + expression + " }}<|im_end|>"
    for text in (
        "<|im_end|>" * 20,
        "<|im_ end|> <|IM_END|>",
        ">|dne_mi|<",
        "<|im_x_end|><|im_xend|>",
        "end|>",
        "_end|>",
    ):
        rendered, special = special_of(source, {"role": "user", "content": text})
        assert special == ["<|im_start|>", "<|im_end|>"]
        expected = {
            "text[:60]": text[:60],
            "text[60:]": text[60:],
            "text | reverse": text[::-1],
            "text | replace(' ', '')": text.replace(" ", ""),
            "'<|im_' ~ text[-7:]": "<|im_" + text[-7:],
        }.get(expression)
        if expected is not None:
            assert rendered == f"<|im_start|>{expected}<|im_end|>"


def test_templates_that_keep_their_tokens_in_variables() -> None:
    source = (
        "{%- set end = '<|im_end|>' -%}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim | lower + end + eos_token }}"
        "{% endfor %}"
    )
    text, special = special_of(source, {"role": "user", "content": "  <|IM_START|> Ho\n"})
    assert text == "<|im_start|>user\n<|im_start|> ho<|im_end|><|im_end|>"
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]


def test_found_objects_are_tokens_in_answers() -> None:
    text = "<|box_start|>(1,2)<|box_end|><|im_end|>"
    source = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert special_of(source, {"role": "user", "content": text}) == (text, [])
    found = ["<|box_start|>", "<|box_end|>"]
    assert special_of(source, {"role": "assistant", "content": text}) == (text, found)
    parts = "{{ messages[0]['content'][0]['text'] }}"
    assert special_of(parts, {**user(text), "role": "assistant"}) == (text, found)


def test_texts_stay_as_they_are() -> None:
    template = ChatTemplate("{{ messages[0]['content'] }}", special_tokens=SPECIAL)
    for text in ("[1:0]", "]", " \n", "\ud7ff\ue000\U0010ffff", "{{ messages }}", "{% raw %}"):
        assert template.render([{"role": "user", "content": text}]) == [(text, False)]


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(ValueError, match="half a surrogate pair at character 1"):
        ChatTemplate(special_tokens=SPECIAL).render([user("a\ud800")])
    with pytest.raises(FormatError, match=r"^m: the template writes half a surrogate pair"):
        ChatTemplate("{{ '\\udfff' }}", "m", SPECIAL).render([user("a")])


TOOLS = """{%- if tools %}{{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson(indent=4) }}{%- endfor %}{{- "<|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
                and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}{%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index or loop.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') }}
            {{- '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}{{- call.arguments | tojson }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def test_a_template_for_tools_and_thoughts() -> None:
    """After Qwen3's: slices, methods, namespaces; a message's text cut at a marker of its own."""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nd"},
    ]
    text, special = special_of(TOOLS, *messages)
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nhm\n</think>\n\nd<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(special) == 9


def test_transformers_settings() -> None:
    """Blocks swallow their line ends; break and continue work; tojson does not escape."""
    source = """
    {% for m in messages %}
        {% if loop.index0 == 1 %}{% break %}{% endif %}
{{ m['role'] }}{{ {'é': '<'} | tojson }}
    {% endfor %}
"""
    assert rendered(ChatTemplate(source), [user("a"), user("b")]) == '\nuser{"é": "<"}\n'


def test_raise_exception() -> None:
    template = ChatTemplate("{{ raise_exception('no pictures, please') }}", "m.gguf: template")
    with pytest.raises(ValueError, match=r"m\.gguf: template: no pictures, please"):
        template.render([user("a")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['secrets'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].pop('role') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ 'x' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 9 ** 9999999 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x'.center(1000000000) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{{ undefined_name.attribute }}",
        "{{ messages[0]['role'] + 1 }}",
    ],
)
def test_what_a_template_may_not_do(source: str) -> None:
    with pytest.raises(FormatError, match=r"^m\.gguf"):
        ChatTemplate(source, "m.gguf: tokenizer.chat_template").render([user("a")])


def test_bad_sources() -> None:
    with pytest.raises(FormatError, match=r"m\.gguf: line 2: "):
        ChatTemplate("{{ 1 }}\n{% for %}", "m.gguf")
    with pytest.raises(FormatError, match=f"at most {MAX_TEMPLATE_CHARS} characters, found"):
        ChatTemplate(" " * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(FormatError, match="not a template"):
        ChatTemplate("{{ " + "(" * 5000 + ")" * 5000 + " }}")
    with pytest.raises(FormatError, match="center"):
        ChatTemplate("{{ 'x' | center(1000000000) }}")


def test_long_messages_pass() -> None:
    text = "word " * MAX_ADDED_CHARS
    assert text.strip() in rendered(ChatTemplate(), [user(text)])


@pytest.mark.parity
def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    tokenizer = transformers.AutoTokenizer.from_pretrained(PUBLISHED.parent)
    conversations = [
        [user("a")],
        [
            {"role": "system", "content": " s "},
            user("IMAGE", "b\n"),
            {"role": "assistant", "content": "c"},
            user("\nd"),
        ],
        [user("IMAGE", "IMAGE"), {"role": "assistant", "content": ""}, user("", "e")],
    ]
    for messages in conversations:
        for prompt in (True, False):
            for number in (True, False):
                expected = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, add_vision_id=number
                )
                options = {"add_generation_prompt": prompt, "add_vision_id": number}
                assert rendered(ChatTemplate(), messages, **options) == expected


# --- variables ------------------------------------------------------------------------------------------


def test_variables() -> None:
    """As NuExtract's template takes them."""
    source = (
        "{% if template %}# Template:\n{{ template }}\n{% endif %}"
        "{% for e in examples or [] %}{{ e.input }} -> {{ e.output | tojson }}\n{% endfor %}"
        "{{ messages[0].content[0].text }}"
    )
    template = ChatTemplate(source)
    variables = {
        "template": '{"name": "string"}',
        "examples": ({"input": "a", "output": {"n": [1, None, 2.5]}},),
    }
    assert template.render([user("x")], variables=variables) == [
        ('# Template:\n{"name": "string"}\na -> {"n": [1, null, 2.5]}\nx', False)
    ]
    assert template.render([user("x")]) == template.render([user("x")], variables={}) == [("x", False)]


def test_texts_of_variables_stay_text() -> None:
    source = "<|im_start|>{{ v }}{% for k in d %}{{ k }}{{ d[k] }}{% endfor %}<|im_end|>"
    variables = {"v": "<|im_end|>", "d": {"<|im_start|>": "<|image_pad|>"}}
    pieces = ChatTemplate(source, special_tokens=SPECIAL).render([user("a")], variables=variables)
    assert pieces == [
        ("<|im_start|>", True),
        ("<|im_end|><|im_start|><|image_pad|>", False),
        ("<|im_end|>", True),
    ]


class Odd:
    pass


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        *(
            ({name: 1}, f"template variable: '{name}' is the template's own")
            for name in ("messages", "eos_token", "add_generation_prompt", "add_vision_id", "bos_token")
        ),
        *(
            ({name: 1}, f"template variable: '{name}' is the template's own")
            for name in ("raise_exception", "namespace", "range", "dict", "cycler", "joiner")
        ),
        ({"a b": 1}, "template variable: expected a name, found 'a b'"),
        ({3: 1}, "template variable: expected a name, found 3"),
        ({"x": Odd()}, "template variable 'x': expected text, numbers, lists and objects, found Odd"),
        ({"x": [b"a"]}, "template variable 'x': expected text, .* found bytes"),
        ({"x": {1: 2}}, "template variable 'x': expected texts as an object's keys"),
        ({"x": "\ud800"}, "surrogate|character"),
        ({"x": {"\ud800": 1}}, "surrogate|character"),
        ({"x": nested(40)}, "template variable 'x': more than 30 lists in one another"),
        ({"x": "a" * 2**20}, "template variables: expected at most 1048576 characters, found"),
        ({"x": [0] * 2**18}, "template variables: expected at most 1048576 characters, found"),
    ],
)
def test_variables_that_are_refused(variables: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate("{{ x }}", special_tokens=SPECIAL).render([user("a")], variables=variables)


def test_variables_count_in_the_budget() -> None:
    deepest = nested(28)
    assert ChatTemplate("{{ x | tojson }}").render([user("a")], variables={"x": deepest})
    text = "a" * 2**19
    [(out, _)] = ChatTemplate("{{ x }}").render([user("a")], variables={"x": text})
    assert out == text
    source = "{% for i in range(9) %}{{ x }}{% endfor %}"
    with pytest.raises(FormatError, match=r"characters of output|takes too much work"):
        ChatTemplate(source).render([user("a")], variables={"x": text})
