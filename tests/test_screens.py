"""Screens: actions that fine-tunes write, places in every convention, the last pictures of a talk."""

from __future__ import annotations

import random
from typing import Any

import pytest

from qwen2vl_q.chat.screens import MAX_CHARS, Action, converted, keep_screens, parse_actions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Thought: I see it.\nAction: click(start_box='(100,200)')",
            [Action("click", ((100, 200),))],
        ),
        (
            "Action: drag(start_box='(1,2)', end_box='(30,40)')",
            [Action("drag", ((1, 2), (30, 40)))],
        ),
        ("click(start_box='(10,20,30,40)')", [Action("click", ((20, 30),))]),
        (
            r"type(content='It\'s (a) \"test\"\n')",
            [Action("type", (), {"content": "It's (a) \"test\"\n"})],
        ),
        ("type(content='two\nlines')", [Action("type", (), {"content": "two\nlines"})]),
        (
            "scroll(start_box='(5,6)', direction='down')\nwait()\nfinished()",
            [Action("scroll", ((5, 6),), {"direction": "down"}), Action("wait"), Action("finished")],
        ),
        ("hotkey(key='ctrl c')", [Action("hotkey", (), {"key": "ctrl c"})]),
        (
            "pyautogui.click(x=0.5, y=0.25)\npyautogui.write(message='hi', interval=0.1)",
            [Action("click", ((0.5, 0.25),)), Action("write", (), {"message": "hi", "interval": "0.1"})],
        ),
        ("pyautogui.moveTo(0.1, 0.2)", [Action("moveto", ((0.1, 0.2),))]),
        (
            "{'action': 'CLICK', 'value': None, 'position': [0.49, 0.42]}",
            [Action("click", ((0.49, 0.42),))],
        ),
        (
            '{"action": "INPUT", "value": "weather", "position": null}',
            [Action("input", (), {"value": "weather"})],
        ),
        ("actions:\nCLICK <point>[[101, 872]]</point>", [Action("click", ((101, 872),))]),
        ("CLICK [[101,872]] then TYPE [good day]", [
            Action("click", ((101, 872),)), Action("type", (), {"content": "good day"}),
        ]),
        ("SCROLL [UP]\nCOMPLETE", [Action("scroll", (), {"direction": "UP"}), Action("complete")]),
        ("click(start_box='(100,2", []),
        ("click(start_box=open('x'))", []),
        ("click(*[1])", []),
        ("print(1) f(2) self.click(1, 2)", []),
        ("I would click the button.", []),
        ("", []),
    ],
)  # fmt: skip
def test_actions_are_read(text: str, expected: list[Action]) -> None:
    assert parse_actions(text) == expected


def test_any_text_is_read_in_little_time() -> None:
    rng = random.Random(4)
    pieces = [
        "click(", ")", "'", '"', "(1,2)", "{", "}", "'action':", "CLICK", "[[", "]]", "\\", "x=", "1e9", "\n",
        "type(",         "pyautogui.", "**", "lambda: 0", "[" * 30,
    ]  # fmt: skip
    for _ in range(2000):
        for action in parse_actions("".join(rng.choices(pieces, k=40))):
            assert action.name
    long = ["click(" * 8000, "{'action':" * 6000, "click(x=" + "[" * 6000, "CLICK [" * 8000, "(" * MAX_CHARS]
    for hostile in long:
        assert len(parse_actions(hostile)) <= 256
    for depth, found in ((50, 1), (150, 0)):
        assert len(parse_actions(f"click({'(' * depth}1{')' * depth})")) == found
    quoted = "type('a \\') b', \"c')(\") click("
    assert parse_actions(quoted) == [Action("type", (), {"0": "a ') b", "1": "c')("})]
    with pytest.raises(ValueError, match="at most 65536"):
        parse_actions("x" * (MAX_CHARS + 1))


def test_places_in_every_convention() -> None:
    size, resized = (1920, 1080), (1932, 1092)
    conventions: list[Any] = ["thousandths", "fractions", "resized", "original"]
    same = {"thousandths": (250, 500), "fractions": (0.25, 0.5)}
    same |= {"resized": (483, 546), "original": (480, 540)}
    for source in conventions:
        for target in conventions:
            found = converted(same[source], source, target, size, resized)
            assert found == pytest.approx(same[target])
    with pytest.raises(ValueError, match="resized: expected"):
        converted((1, 2), "resized", "original", size)
    with pytest.raises(ValueError, match="expected thousandths"):
        converted((1, 2), "percent", "original", size)  # type: ignore[arg-type]


def test_the_last_screens_stay() -> None:
    def step(i: int) -> list[dict[str, Any]]:
        picture = {"type": "image", "image": f"{i}.png"}
        return [
            {"role": "user", "content": [picture, {"type": "text", "text": str(i)}]},
            {"role": "assistant", "content": f"click {i}"},
        ]

    talk = [message for i in range(4) for message in step(i)]
    for n in range(6):
        kept = keep_screens(talk, n)
        assert len(kept) == len(talk)
        asked = [m["content"] for m in kept if m["role"] == "user"]
        pictures = [part["image"] for content in asked for part in content if "image" in part]
        assert pictures == [f"{i}.png" for i in range(max(0, 4 - n), 4)]
        assert [content[-1]["text"] for content in asked] == ["0", "1", "2", "3"]
    assert talk[0]["content"][0]["image"] == "0.png"  # as it was
    with pytest.raises(ValueError, match="n"):
        keep_screens(talk, -1)
