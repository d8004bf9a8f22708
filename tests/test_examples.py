"""Every example runs on the packaged model and answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
EXPECTED = {
    "chat.py": "A purple triangle and a black diamond.\n",
    "several_pictures.py": "tokens were there already\n",
    "streaming.py": " tokens of the picture in ",
    "many_at_once.py": "card 0: What is in the picture? A purple triangle and a black diamond.\n",
}


def test_all_are_known() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert EXPECTED[name] in done.stdout
