"""What is published: for which Pythons, by which actions."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_there_is_a_wheel_for_each_python_that_is_promised() -> None:
    promised = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PROJECT)
    built = re.search(r'^build = "cp3\{([\d,]+)\}-\*"$', PROJECT, re.MULTILINE)
    assert built is not None
    assert built[1].split(",") == promised
    assert f'requires-python = ">=3.{promised[0]}"' in PROJECT


def test_actions_are_pinned() -> None:
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for action in re.findall(r"uses: (.*)", workflow.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), (
                f"{workflow.name}: {action}"
            )
