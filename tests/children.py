"""Scripts in a process of their own: what may hang, crash or eat memory must not take the tests with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping


def run_script(
    script: str, *arguments: object, timeout: float = 120, env: Mapping[str, str] | None = None
) -> str:
    """What `script` prints; `arguments` are its sys.argv[1:]. An end that is not its own fails the test."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout
