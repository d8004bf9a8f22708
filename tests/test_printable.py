from __future__ import annotations

import pytest

from qwen2vl_q.base.printable import printable


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain é 画", "plain é 画"),
        ("\x1b[31mred\n", "\\x1b[31mred\\n"),
        ("a\u202eb\ud800", "a\\u202eb\\ud800"),
        ("\x9b2J", "\\x9b2J"),
        (["a", 1], "['a', 1]"),
        pytest.param(10**5000, "<int>", id="digits"),
    ],
)
def test_controls_are_escaped(value: object, expected: str) -> None:
    assert printable(value) == expected


def test_long_values_are_cut() -> None:
    assert printable("x" * 10**6, 5) == "xxxxx... (1000000 in all)"
    assert printable("x" * 5, 5) == "xxxxx"
    assert len(printable(list(range(10**5)))) < 150
