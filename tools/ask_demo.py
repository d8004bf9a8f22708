"""Asks the demo model of the installed qwen2vl-q about its card, with every instruction set of this machine.

    python tools/ask_demo.py            # in the environment of the wheel that is to be tried

Prints a line each; the exit code is 1 where an answer is not the truth that the demo prints beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def ask(isa: str, folder: Path) -> list[tuple[str, str]]:
    """(answer, truth) of each question of `qwen2vl-q demo`."""
    shown = subprocess.run(
        [sys.executable, "-m", "qwen2vl_q", "demo", "-o", str(folder / f"{isa}.png")],
        env={**os.environ, "QWEN2VL_ISA": isa},
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    found = {"answer": [], "truth": []}
    for line in shown.stdout.splitlines():
        kind, _, text = line.strip().partition("  ")
        if kind in found:
            found[kind].append(text.strip())
    return list(zip(found["answer"], found["truth"], strict=True))


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from qwen2vl_q import _native

    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for isa in _native.supported_isas():
            answers = ask(isa, Path(folder))
            wrong = [f"expected {truth!r}, found {answer!r}" for answer, truth in answers if answer != truth]
            if not answers:
                wrong = ["no answers"]
            print(f"{isa}: {'; '.join(wrong) or f'{len(answers)} right answers'}", flush=True)
            failed = failed or bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
