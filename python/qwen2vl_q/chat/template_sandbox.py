"""jinja2's sandbox for a file's template, with bounds on time and memory.

jinja2 keeps a template away from Python's internals, not from `x ~ x` forty times over. Here whatever takes
longer the larger its values are pays for them first, from what a rendering has (`Meter`): the operators,
filters, tests and methods, of which there are those alone that are listed, and what a template prints. Loops
and macros pay a step for every part of their bodies, each time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

MAX_DEPTH = 32  # of lists in lists
MAX_INDENT = 16

_STEP = 8  # of work: a node of the template, an item of a list; a character is 1
_LISTS: Any = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS: Any = (dict, *_LISTS)
_SIZED: Any = (range, *_CONTAINERS)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METHODS: dict[type, frozenset[str]] = {
    str: _names(
        """capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace
        isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit
        rstrip split splitlines startswith strip title upper"""
    ),
    dict: _names("get items keys values"),
    list: _names("count index"),
    tuple: _names("count index"),
}
_FILTERS = _names(
    "abs capitalize dictsort float int lower max min sort string title trim truncate unique upper"
)
# They look at a value's items, not into them.
_SHALLOW_FILTERS = _names(
    "count d default first items last length list map reject rejectattr reverse select selectattr"
)
_COMPARISONS = _names("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt ne")
_TYPE_TESTS = _names(
    """boolean callable defined false float integer iterable mapping none number sameas sequence string true
    undefined"""
)
_INTEGER_TESTS = _names("divisibleby even odd")


class Meter:
    """What one rendering may still do."""

    def __init__(self, work: int, longest: int) -> None:
        """work: in steps of `_STEP` and characters; longest: the characters of a text."""
        self.left = work
        self.longest = longest

    def spend(self, work: int) -> bool:
        self.left -= work
        if self.left < 0:
            raise SecurityError("takes too much work")
        return True

    def require(self, length: int) -> None:
        """Of a text that is to be made."""
        if length > self.longest:
            raise SecurityError(f"makes a text of more than {self.longest} characters")
        self.spend(length)

    def weigh(self, value: Any, depth: int = 0) -> Any:
        """Pays for a value and everything in it; returns it."""
        self.spend(_STEP)
        if isinstance(value, str):
            self.require(len(value))
        elif isinstance(value, _CONTAINERS):
            if depth == MAX_DEPTH:
                raise SecurityError(f"more than {MAX_DEPTH} lists in one another")
            for item in value:
                self.weigh(item, depth + 1)
            if isinstance(value, dict):
                for item in value.values():
                    self.weigh(item, depth + 1)
        elif isinstance(value, range):
            self.spend(_STEP * len(value))
        elif isinstance(value, int):
            self.spend(value.bit_length() // 8)
        return value

    def skim(self, value: Any) -> Any:
        """Pays for a value's own items; returns it."""
        if isinstance(value, str):
            self.spend(_STEP + len(value))
        elif isinstance(value, _SIZED):
            self.spend(_STEP + _STEP * len(value))
        else:
            self.spend(_STEP)
        return value

    def search(self, text: str, arguments: Iterable[Any]) -> None:
        """Pays for finding the arguments in a text, or the text's characters in them, where that takes the
        product of their lengths."""
        for argument in arguments:
            if isinstance(argument, str):
                self.spend(len(text) * len(argument) // 64)

    def result(self, value: Any) -> Any:
        """Pays for what an operation made; returns it."""
        if isinstance(value, str):
            self.require(len(value))
        elif isinstance(value, _LISTS):
            self.spend(_STEP * len(value))
        return value


def weight(value: Any) -> int:
    """What `Meter.weigh` takes for a value."""
    meter = Meter(sys.maxsize, sys.maxsize)
    meter.weigh(value)
    return sys.maxsize - meter.left


# Of the rendering under way. While a template is compiled there is none: jinja2, which evaluates constant
# expressions then, takes the LookupError as the answer that this one is not constant.
METER: ContextVar[Meter] = ContextVar("METER")


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment, bounded. `compile_template` makes its templates."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=_finalize,
        )
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
        }
        filters: dict[str, Any] = self.filters
        tests: dict[str, Any] = self.tests
        self.filters = {
            **{name: _metered(filters[name], Meter.weigh) for name in _FILTERS},
            **{name: _metered(filters[name], Meter.skim) for name in _SHALLOW_FILTERS},
            "join": _metered(_join, Meter.skim),
            "replace": _metered(_replace, Meter.weigh),
            "safe": _metered(filters["string"], Meter.weigh),  # nothing is escaped
            "tojson": _metered(_to_json, Meter.weigh),
            # What `_Instrument` writes.
            "(concat)": _concat,
            "(skim)": lambda value: METER.get().skim(value),
            "(spend)": lambda steps: METER.get().spend(_STEP * abs(steps)),  # a template may name it to `map`
            "(weigh)": lambda value: METER.get().weigh(value),
        }
        self.tests = {
            **{name: tests[name] for name in _TYPE_TESTS},
            **{name: _metered(tests[name], Meter.weigh) for name in _COMPARISONS},
            **{name: _of_integers(tests[name]) for name in _INTEGER_TESTS},
        }

    def compile_template(self, source: str, write: Callable[[str], str]) -> jinja2.Template:
        """`write` is applied to the texts that stand in the template."""
        tree = _Instrument(write).visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (LoopContext, Macro, Namespace, Cycler, Joiner, jinja2.Undefined)):
            return super().is_safe_attribute(obj, attr, value)
        return attr in _METHODS.get(type(obj), ())

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed str.format: `is_safe_attribute` refuses it."""

    def getitem(self, obj: Any, argument: Any) -> Any:
        METER.get().spend(4 * _STEP)  # filters take paths of any length: map(attribute="a.a.a")
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.spend(_STEP * (8 + len(args) + len(kwargs)))  # a macro's call takes as long
        if not isinstance(__obj, Macro):
            meter.weigh((args, kwargs))
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, (str, list, tuple)):
                meter.weigh(owner)
            if isinstance(owner, str):
                meter.search(owner, args)
                if __obj.__name__ == "join":
                    __obj = partial(_join, d=owner)
                elif __obj.__name__ == "replace":
                    __obj = partial(_replace, owner)
        return meter.result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sides = (left, right)
        if operator == "+" and all(isinstance(side, (str, list, tuple)) for side in sides):
            meter = METER.get()
            if isinstance(left, str):
                meter.require(len(left) + len(right))
            for side in sides:
                meter.skim(side)
        elif isinstance(left, jinja2.Undefined) or isinstance(right, jinja2.Undefined):
            pass  # its own error names it
        elif not all(isinstance(side, (int, float)) and abs(side) < 2**31 for side in sides):
            raise SecurityError(f"operator {operator!r} on other things than small numbers")
        elif operator == "**" and abs(right) > 64:
            raise SecurityError(f"power {right}")
        return super().call_binop(context, operator, left, right)


class _Namespace(Namespace):
    def __repr__(self) -> str:
        return "<Namespace>"  # not what is in it, which may be itself many times over


class _Instrument(NodeTransformer):
    """Writes into a template that it pays, and where the environment is not asked, through which filter."""

    def __init__(self, write: Callable[[str], str]) -> None:
        self._write = write

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._write(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        value = self._write(node.value) if isinstance(node.value, str) else node.value
        return nodes.Const(value, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        steps = _steps(node)
        self._pay_in_body(node)
        if node.test is not None:
            node.test = nodes.And(_filter(steps, "(spend)"), node.test, lineno=node.lineno)
        return node

    def _pay_in_body(self, node: Any) -> Any:
        steps = _steps(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(steps, "(spend)"), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _pay_in_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "(concat)")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        last = node.ops[-1]
        constant = isinstance(node.expr, nodes.Const) or isinstance(last.expr, nodes.Const)
        if len(node.ops) > 1 or not constant:
            node.expr = _filter(node.expr, "(weigh)")
            for operand in node.ops:
                operand.expr = _filter(operand.expr, "(weigh)")
        elif last.op in ("in", "notin") and not isinstance(last.expr, nodes.Const):
            last.expr = _filter(last.expr, "(skim)")
        return node  # to be compared with a constant takes no longer than that is

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "(skim)")
        elif not isinstance(node.arg, nodes.Const):
            node.arg = _filter(node.arg, "(weigh)")
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.key, nodes.Const):
            node.key = _filter(node.key, "(weigh)")
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not supported", node.lineno)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _steps(node: nodes.Node) -> nodes.Const:
    """What the parts of a node take, once each."""
    parts = list(node.find_all(nodes.Node))
    text = sum(len(part.data) for part in parts if isinstance(part, nodes.TemplateData))
    return nodes.Const(1 + len(parts) + text // _STEP, lineno=node.lineno)


@jinja2.pass_context
def _finalize(_context: jinja2.runtime.Context, value: Any) -> Any:
    return METER.get().weigh(value)


def _metered(function: Callable[..., Any], pay: Callable[[Meter, Any], Any]) -> Callable[..., Any]:
    """A filter or test that pays for its arguments; those that jinja2 passes itself are a step each."""

    @wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        for value in (*args, *kwargs.values()):
            pay(meter, value)
        if args and isinstance(args[0], str):
            meter.search(args[0], args[1:])
            meter.search(args[0], kwargs.values())
        return meter.result(function(*args, **kwargs))

    return metered


def _of_integers(test: Callable[..., Any]) -> Callable[..., bool]:
    """One that computes with %: on texts that would be formatting."""

    def checked(*numbers: Any) -> bool:
        if not all(isinstance(number, int) for number in numbers):
            raise SecurityError("a test of integers on other things")
        return bool(test(*numbers))

    return checked


def _concat(values: Iterable[Any]) -> str:
    return _join(values, "")


def _join(value: Iterable[Any], d: str = "") -> str:
    meter = METER.get()
    texts = [str(meter.weigh(item)) for item in value]
    meter.require(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def _replace(s: Any, old: str, new: str, count: int | None = None) -> str:
    text, limit = str(s), -1 if count is None else count
    METER.get().require(len(text) + text.count(old) * len(new))
    return text.replace(old, new, limit)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: jinja2's own escapes for HTML."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
        raise SecurityError(f"tojson: expected an indent of 0 to {MAX_INDENT}")
    meter = METER.get()
    before = meter.left
    meter.weigh(value)
    items = (before - meter.left) // _STEP
    meter.spend(items * (MAX_DEPTH * (indent or 0) + sum(map(len, separators or ()))))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
