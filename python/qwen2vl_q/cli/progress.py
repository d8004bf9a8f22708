"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from qwen2vl_q.cli.output import say

if TYPE_CHECKING:
    from rich.progress import Progress

_LABELS = {
    "convert": "Converting",
    "load": "Loading",
    "image": "Looking at the image",
    "prefill": "Reading the prompt",
    "weights": "Comparing weights",
    "answers": "Comparing answers",
}
_PATIENCE = 0.3  # seconds before a bar appears: what is quick needs none
_LONG = 10.0  # seconds that are worth a line where no bar can be


class StageBars:
    """A callback for Qwen2VL's `progress`: a bar for each stage that takes a while; where stderr is no
    terminal, a line that says how long, from the stage's first part. Closing takes the bar away."""

    def __init__(self) -> None:
        self._stage = ""
        self._since = 0.0
        self._mark = 0.0, 0  # a moment, and what was done then
        self._told = False
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._told = stage, False
            self._since = time.monotonic()
            self._mark = self._since, done
        if not sys.stderr.isatty():
            self._foretell(done, total)
        elif self._bar is None and time.monotonic() - self._since >= _PATIENCE and done < total:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.add_task(_LABELS.get(stage, stage), total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done >= total:
            self.close()

    def _foretell(self, done: int, total: int) -> None:
        """Says, once a stage, how long the rest takes at the speed since the mark."""
        now, (since, begun) = time.monotonic(), self._mark
        if done > begun and now - since < _PATIENCE:
            return  # too short to measure
        self._mark = now, done
        rest = (now - since) * (total - done) / (done - begun) if done > begun else 0.0
        if rest >= _LONG and not self._told:
            self._told = True
            # A prompt's later tokens look at more, so they take longer; the vision tower's layers are alike.
            bound = "at least" if self._stage == "prefill" else "about"
            say(f"{_LABELS.get(self._stage, self._stage)}: {bound} {rest:.0f} s more")

    def close(self) -> None:
        self._stage = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> StageBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
