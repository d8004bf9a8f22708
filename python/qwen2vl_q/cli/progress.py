"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from qwen2vl_q.cli.output import say

if TYPE_CHECKING:
    from rich.progress import Progress

_LABELS = {"load": "Loading", "image": "Looking at the image", "prefill": "Reading the prompt"}
_PATIENCE = 0.3  # seconds before a bar appears: what is quick needs none
_LONG = 10.0  # seconds that are worth a line where no bar can be


class StageBars:
    """A callback for Qwen2VL's `progress`: a bar for each stage that takes a while; where stderr is no
    terminal, a line that says how long, from the stage's first part. Closing takes the bar away."""

    def __init__(self) -> None:
        self._stage = ""
        self._since = 0.0
        self._begun = 0  # what was done when the stage came up
        self._told = False
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self.close()
            self._stage, self._since, self._begun, self._told = stage, time.monotonic(), done, False
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
        seconds = time.monotonic() - self._since
        if self._told or seconds < _PATIENCE or done <= self._begun:
            return
        self._told = True
        expected = seconds * (total - self._begun) / (done - self._begun)
        if expected >= _LONG:
            # A prompt's later tokens look at more, so they take longer; the vision tower's layers are alike.
            bound = "at least" if self._stage == "prefill" else "about"
            say(f"{_LABELS.get(self._stage, self._stage)}: {bound} {expected:.0f} s")

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
