"""How tests run the command line: in a process of its own, or in theirs (the fixture `run`)."""

from __future__ import annotations

import sys
from collections.abc import Callable

PROGRAM = [sys.executable, "-m", "qwen2vl_q"]

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr
