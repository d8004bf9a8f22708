"""Progress bars on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_LABELS = {"load": "Loading", "image": "Looking at the image", "prefill": "Reading the prompt"}
_PATIENCE = 0.3  # seconds before a bar appears: what is quick needs none


class StageBars:
    """A callback for Qwen2VL's `progress`: a bar for each stage that takes a while, none where stderr is no
    terminal. Closing takes the bar away."""

    def __init__(self) -> None:
        self._stage = ""
        self._since = 0.0
        self._bar: Progress | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if stage != self._stage:
            self.close()
            self._stage, self._since = stage, time.monotonic()
        if self._bar is None and time.monotonic() - self._since >= _PATIENCE and done < total:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.add_task(_LABELS.get(stage, stage), total=total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        if done >= total:
            self.close()

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
