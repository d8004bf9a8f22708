"""For agents that look at screens: the last pictures of a talk, places in each convention, actions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.printable import printable

Convention: TypeAlias = Literal["thousandths", "fractions", "resized", "original"]
Point: TypeAlias = "tuple[float, float]"

MAX_CHARS = 65536  # of an answer
_LONGEST_CALL = 8192
_MOST_NESTED = 100  # parentheses of a call; Python itself reads 200
_MAX_ACTIONS = 256
_PLACES = ("start_box", "end_box", "point", "position", "start_point", "end_point", "box", "coordinate")
_SCALES: dict[str, float] = {"thousandths": 1000.0, "fractions": 1.0}


def converted(
    point: Point,
    source: Convention,
    target: Convention,
    original: tuple[int, int],
    resized: tuple[int, int] | None = None,
) -> Point:
    """A place said in one convention, in another: "thousandths" (0 to 1000; Qwen2-VL, UI-TARS, OS-Atlas,
    UGround), "fractions" (0 to 1; ShowUI, Aguvis), pixels of the picture as the model saw it ("resized"), or
    of the screen ("original").

    original, resized: (width, height); resized, that of `ProcessedImage`, is wanted where it is a convention.
    ValueError for sizes that are missing or not positive.
    """

    def scale(convention: Convention) -> tuple[float, float]:
        if convention in _SCALES:
            return _SCALES[convention], _SCALES[convention]
        if convention not in ("resized", "original"):
            known = "thousandths, fractions, resized or original"
            raise ValueError(f"expected {known}, found {printable(convention)}")
        size = original if convention == "original" else resized
        if size is None or min(size) < 1:
            raise ValueError(f"{convention}: expected the picture's width and height, found {size}")
        return float(size[0]), float(size[1])

    (a, b), (c, d) = scale(source), scale(target)
    return point[0] / a * c, point[1] / b * d


def keep_screens(messages: Iterable[Mapping[str, Any]], n: int) -> list[dict[str, Any]]:
    """A conversation whose last n pictures stay; earlier ones become the text "(an earlier screen)". Agents'
    talks grow by a picture a step, and models were trained on a few of them (UI-TARS: 5). To share a budget
    over those that stay: `chat(..., vision_tokens=N)`."""
    integer("n", n, 0, 2**31 - 1)
    kept: list[dict[str, Any]] = []
    left = n
    for message in reversed(list(messages)):
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = []
            for part in reversed(content):
                is_picture = isinstance(part, Mapping) and part.get("type") in ("image", "image_url")
                if is_picture and left == 0:
                    part = {"type": "text", "text": "(an earlier screen)"}
                elif is_picture:
                    left -= 1
                parts.append(part)
            content = parts[::-1]
        kept.append({**message, "content": content})
    return kept[::-1]


@dataclass(frozen=True)
class Action:
    """name: click, double_click, type, scroll, hotkey, wait, finished ... as the model says it, in lower
    case. points: as it says them, in its convention (`converted`); of a box, its middle. arguments:
    whatever else it says: content, direction, key."""

    name: str
    points: tuple[Point, ...] = ()
    arguments: dict[str, str] = field(default_factory=dict)


# pyautogui.click(x=0.5, y=0.3); click(start_box='(100,200)')
_CALL = re.compile(r"(?<![\w.])(?:pyautogui\.|mobile\.)?([A-Za-z_]\w{0,40})\(")
# {'action': 'CLICK', 'value': None, 'position': [0.49, 0.42]}
_RECORD = re.compile(r"\{[^{}]{0,4000}?['\"]action['\"]\s*:[^{}]{0,4000}\}", re.IGNORECASE)
# CLICK <point>[[101, 872]]</point>, TYPE [hello], SCROLL [UP]
_WORDS = re.compile(
    r"\b(CLICK|DOUBLE_CLICK|LONG_PRESS|TYPE|SCROLL|DRAG|PRESS_[A-Z]+|WAIT|COMPLETE|ENTER)\b"
    r"(?:[ \t]*(?:<point>)?[ \t]*\[(\[[^\[\]]{0,200}\](?:,[ \t]*\[[^\[\]]{0,200}\])?|[^\[\]\n]{0,2000})\])?"
)
_MARK = re.compile(r"[()'\"]")
_QUOTED = {quote: re.compile(rf"(?:[^\\{quote}]|\\.)*{quote}", re.DOTALL) for quote in "'\""}
_NUMBER = r"-?\d{1,7}(?:\.\d{1,7})?"
_NUMBERS = re.compile(_NUMBER)
_KNOWN = frozenset(
    [
        "click",
        "left_single",
        "left_double",
        "right_single",
        "double_click",
        "right_click",
        "tripleclick",
        "doubleclick",
        "rightclick",
        "moveto",
        "dragto",
        "drag",
        "select",
        "scroll",
        "hscroll",
        "type",
        "write",
        "input",
        "hotkey",
        "press",
        "keydown",
        "keyup",
        "wait",
        "sleep",
        "finished",
        "terminate",
        "answer",
        "call_user",
        "open_app",
        "navigate_back",
        "navigate_home",
        "home",
        "back",
        "swipe",
        "long_press",
        "enter",
        "hover",
        "tap",
    ]
)


def parse_actions(text: str) -> list[Action]:
    """The actions of an answer, in their order: calls (UI-TARS' `click(start_box='(100,200)')`, Aguvis'
    `pyautogui.click(x=0.5, y=0.3)`), records (ShowUI's `{'action': 'CLICK', 'position': [0.5, 0.3]}`), words
    (OS-Atlas' `CLICK [[100, 200]]`). What is cut or none of these is left out; nothing of it is run.
    ValueError for a text of more than MAX_CHARS."""
    if len(text) > MAX_CHARS:
        raise ValueError(f"expected an answer of at most {MAX_CHARS} characters, found {len(text)}")
    found = sorted([*_calls(text), *_records(text), *_words(text)], key=lambda item: item[0])
    return [action for _, action in found][:_MAX_ACTIONS]


def _calls(text: str) -> Iterator[tuple[int, Action]]:
    end = 0
    for call in _CALL.finditer(text):
        if call.start() < end or call[1].lower() not in _KNOWN:
            continue
        end = _end_of_call(text, call.end())
        arguments = _arguments(text[call.end() : end - 1]) if end else None
        if arguments is not None:
            yield call.start(), _action(call[1], arguments)


def _end_of_call(text: str, begin: int) -> int:
    """Behind its last parenthesis; 0: it has none, or more than an action has. Calls without an end that
    follow each other are nested: each is given up soon."""
    depth, i, last = 1, begin, begin + _LONGEST_CALL
    while mark := _MARK.search(text, i, last):
        i = mark.end()
        if quoted := _QUOTED.get(mark[0]):
            closed = quoted.match(text, i, last)
            if closed is None:
                return 0
            i = closed.end()
            continue
        depth += 1 if mark[0] == "(" else -1
        if depth == 0:
            return i
        if depth > _MOST_NESTED:
            return 0
    return 0


def _arguments(text: str) -> dict[str, Any] | None:
    """By their names, those without one by their numbers; None: they are no literals."""
    try:
        call = ast.parse(f"f({text})".replace("\n", "\\n"), mode="eval").body
        if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
            return None
        named: dict[str, Any] = {str(i): ast.literal_eval(value) for i, value in enumerate(call.args)}
        return named | {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _records(text: str) -> Iterator[tuple[int, Action]]:
    for record in _RECORD.finditer(text):
        source = re.sub(r"\bnull\b", "None", record[0])
        try:
            found = ast.literal_eval(source)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            continue
        named = {str(key).lower(): value for key, value in found.items()}
        name = named.pop("action", None)
        if isinstance(name, str):
            yield record.start(), _action(name, named)


def _words(text: str) -> Iterator[tuple[int, Action]]:
    for word in _WORDS.finditer(text):
        if text[word.end(1) : word.end(1) + 1] == "(" or text[word.start() - 1 : word.start()] in ("'", '"'):
            continue  # a call, a record
        inside = word[2] or ""
        if inside.startswith("["):
            yield word.start(), Action(word[1].lower(), _points(inside))
        else:
            given = {"direction" if word[1] == "SCROLL" else "content": inside} if inside else {}
            yield word.start(), Action(word[1].lower(), (), given)


def _action(name: str, arguments: Mapping[str, Any]) -> Action:
    points: list[Point] = []
    rest: dict[str, str] = {}
    x: Any = arguments.get("x")
    y: Any = arguments.get("y")
    if _is_number(x) and _is_number(y):
        points.append((float(x), float(y)))
    for key, value in arguments.items():
        if key in ("x", "y") and points:
            continue
        if key in _PLACES:
            points += _points(value)
        elif value is not None:
            rest[key] = value if isinstance(value, str) else str(value)
    if not points and _is_number(arguments.get("0")) and _is_number(arguments.get("1")):
        points.append((float(arguments["0"]), float(arguments["1"])))
        rest = {key: value for key, value in rest.items() if key not in ("0", "1")}
    return Action(name.lower(), tuple(points), rest)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e7


def _points(value: Any) -> tuple[Point, ...]:
    """Of "(x,y)", "(x0,y0,x1,y1)" (its middle), [x, y], [[x, y], ...]."""
    numbers = [float(number) for number in _NUMBERS.findall(str(value)[:400])]
    if str(value).count("[") < 2 and len(numbers) == 4:
        return (((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2),)
    return tuple(zip(numbers[::2], numbers[1::2], strict=False))
