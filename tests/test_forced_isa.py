"""Every instruction set that this machine runs, forced, answers right: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_q import _native

SEEDS = range(12)
CODE = "import sys; from qwen2vl_q.cli.main import main\nfor s in sys.argv[1:]: main(['demo', '--seed', s])"


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_demo_is_right(isa: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, SEEDS)],
        cwd=tmp_path,
        env={**os.environ, "QWEN2VL_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    answers = [line.removeprefix("  answer  ") for line in lines if line.startswith("  answer  ")]
    truths = [line.removeprefix("  truth   ") for line in lines if line.startswith("  truth   ")]
    assert answers == truths and len(answers) == 3 * len(SEEDS)
    assert done.stderr.count(f" tokens/s ({isa}, ") == len(SEEDS)
