"""What a file's template may take: each of these would take gigabytes, or hours, or both."""

from __future__ import annotations

import pytest

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.chat import chat_template
from qwen2vl_q.chat.chat_template import ChatTemplate

LONG = "{% set x = range(20000) | join %}"  # 88,890 characters
TWICE = "{% set l = [l, l] %}"
ATTACKS = {
    "doubling ~": "{% set x = 'xxxxxxxx' %}" + "{% set x = x ~ x %}" * 40,
    "doubling +": "{% set x = 'xxxxxxxx' %}" + "{% set x = x + x %}" * 40,
    "doubling in a loop": "{% set n = namespace(x='x') %}{% for i in range(40) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling a block": "{% set x %}xx{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
    "doubling lists": "{% set l = [1] %}" + "{% set l = l + l %}" * 40,
    "doubling what is safe": "{% set x = '<' | safe %}" + "{% set x = x + x %}" * 40,
    "doubling what is escaped": "{% autoescape true %}{% set x = '<' %}"
    + "{% set x = x ~ x %}" * 40
    + "{% endautoescape %}",
    "text upon text": "{% set n = namespace(x='') %}{% for i in range(99999) %}"
    "{% set n.x = n.x ~ messages[0]['content'] %}{% endfor %}",
    "join": "{% set x = range(9999) | join %}{{ range(99999) | join(x) | length }}",
    "join, the method": "{% set x = range(9999) | join %}{{ x.join(x) | length }}",
    "join by map": "{% set x = range(9999) | join %}{{ [range(99999)] | map('join', x) | list | length }}",
    "replace": LONG + "{{ x | replace('1', x) | length }}",
    "replace, the method": LONG + "{{ x.replace('1', x) | length }}",
    "replace, a constant": "{{ '" + "x" * 60000 + "' | replace('x', '" + "y" * 60000 + "') | length }}",
    "replace in a block": LONG + "{% filter replace('1', x) %}{{ x }}{% endfilter %}",
    "sum": "{{ [[1]] | sum(start=[]) | length }}",
    "tojson": "{{ [[1]] | tojson(indent=2000000000) }}",
    "tojson of lists": "{% set l = [1] %}" + TWICE * 40 + "{{ l | tojson }}",
    "separators": "{{ range(20000) | list | tojson(separators=('y' , 'x' * 2)) }}",
    "long separators": LONG + "{{ range(20000) | list | tojson(separators=(x, x)) }}",
    "lists of lists": "{% set l = [1] %}" + TWICE * 40 + "{{ l }}",
    "equal lists": "{% set l = [1] %}"
    + TWICE * 40
    + "{% set m = l %}{% set l = [1] %}"
    + TWICE * 40
    + "{{ l == m }}",
    "in a list": "{% set l = [1] %}"
    + TWICE * 40
    + "{% set m = l %}{% set l = [1] %}"
    + TWICE * 40
    + "{{ l in [m] }}",
    "a test of lists": "{% set l = [1] %}"
    + TWICE * 40
    + "{% set m = l %}{% set l = [1] %}"
    + TWICE * 40
    + "{{ l is eq m }}",
    "a key": "{% set l = (1,) %}" + "{% set l = (l, l) %}" * 40 + "{{ {l: 1} }}",
    "an item": "{% set l = (1,) %}" + "{% set l = (l, l) %}" * 40 + "{{ {1: 1}[l] }}",
    "get": "{% set l = (1,) %}" + "{% set l = (l, l) %}" * 40 + "{{ {1: 1}.get(l) }}",
    "views": "{% set l = {1: 1} %}" + "{% set l = {1: l, 2: l}.values() %}" * 40 + "{{ l }}",
    "dictionaries": "{% set l = {1: 1} %}" + "{% set l = dict(a=l, b=l) %}" * 40 + "{{ l.items() }}",
    "arguments": "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1, varargs, varargs) }}{% else %}"
    "{{ varargs }}{% endif %}{% endmacro %}{{ f(40) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops that skip": "{% set l = range(99999) | list %}"
    "{% for i in l %}{% for j in l if false %}{% endfor %}{% endfor %}",
    "loops in loops": "{% for i in [1, 2] recursive %}"
    "{% if loop.depth < 90 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n > 0 %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}"
    "{% endmacro %}"
    "{{ f(60) }}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 30
    + "x"
    + "{% endcall %}" * 30,
    "blocks": "{% set n = namespace(d=0) %}{% block a scoped %}{% if n.d < 60 %}{% set n.d = n.d + 1 %}"
    "{% set x = self.a() %}{% set x = self.a() %}{% set n.d = n.d - 1 %}{% endif %}{% endblock %}",
    "long bodies": "{% for i in range(99999) %}" + "{% if i.a.b %}{% endif %}" * 9000 + "{% endfor %}",
    "long paths": "{% set n = namespace() %}{% set n.a = n %}{% for i in range(99999) %}"
    "{% set y = [n, n, n, n] | map(attribute='a" + ".a" * 60000 + "') | list %}{% endfor %}",
    "many arguments": "{% macro f() %}{{ varargs[0] }}{% endmacro %}{% for i in range(99999) %}"
    "{% set x = f(*range(99999)) %}{% endfor %}",
    "more work by a name": "{% for i in range(99999) %}{% set x = [-99999999] | map('(spend)') | list %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a tuple as a filter": "{% set l = (1,) %}" + "{% set l = (l, l) %}" * 40 + "{{ l is filter }}",
    "slices": LONG + "{% for i in range(99999) %}" + "{% set y = x[1:] %}" * 5000 + "{% endfor %}",
    "comparisons": LONG
    + "{% set y = x + 'a' %}{% set z = x + 'b' %}{% for i in range(99999) %}"
    + "{% if y == z %}{% endif %}" * 3000
    + "{% endfor %}",
    "strip": LONG + "{% for i in range(99999) %}{% set y = x.strip(x) %}{% endfor %}",
    "trim": LONG + "{% for i in range(99999) %}{% set y = x | trim(x) %}{% endfor %}",
    "sort": "{% for i in range(99999) %}{% set y = range(99999) | sort %}{% endfor %}",
    "sets": "{% for i in range(99999) %}{% set s = messages[0].keys() - messages[0].keys() %}{% endfor %}",
    "even": "{{ '%1000000000d' is even }}",
    "odd": "{{ '%1000000000d' is odd }}",
    "divisibleby": "{{ '%1000000000d' is divisibleby 1 }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') | length }}",
    "bytes": "{{ 'x'.encode().center(1000000000) | length }}",
    "format_map": "{{ '{:1000000000}'.format_map({}) }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_work_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_WORK", 2**22)  # an eighth: the sooner it ends
    with pytest.raises(FormatError, match=r"^m: .{,200}$"):
        ChatTemplate(ATTACKS[name], "m").render([{"role": "user", "content": "a" * 100}])


def test_the_bound_itself_ends_soon() -> None:
    with pytest.raises(FormatError, match="takes too much work"):
        ChatTemplate(ATTACKS["loops"]).render([{"role": "user", "content": ""}])


def test_namespaces_do_not_print_what_is_in_them() -> None:
    source = "{% set l = namespace() %}" + "{% set l = namespace(a=l, b=l) %}" * 40 + "{{ l }}"
    assert ChatTemplate(source).render([{"role": "user", "content": "a"}]) == [("<Namespace>", False)]


def test_long_conversations_pass() -> None:
    """A template that looks at the whole conversation at each message, as those for tools do."""
    source = (
        "{% for m in messages %}{% set rest = messages[loop.index0:] %}"
        "{% if rest | selectattr('role', 'equalto', 'user') | list | length > 1 and messages | length > 1 %}"
        "{{ m['content'] | trim }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": f"{i} " + "word " * 50} for i in range(300)]
    [(text, _)] = ChatTemplate(source).render(messages)
    assert text.count("word") == 299 * 50
