"""Clips of files, decoded in a process of their own (`video_process`), with so much time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import inf
from os import PathLike, fspath
from pathlib import Path
from threading import Event, Timer
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.video import FRAME_FACTOR, VideoOptions

SECONDS_A_FRAME = 120.0  # the first waits for the file's end to be found


def decoded(
    video: Any,
    factor: int,
    options: VideoOptions,
    limit: int | None,
    budget: int | None,
    seconds: float | None = None,
) -> NDArray[np.uint8]:
    """uint8 [frames, height, width, 3] of a file or its bytes. Errors and warnings of `process_video`."""
    question = {"options": asdict(options), "factor": factor, "limit": limit, "budget": budget}
    name = _name(video)
    patience = _Patience(name, seconds)
    with _asked(video, question, patience) as process:
        pixels = _received(process, patience)
    if pixels is None:
        raise UnsupportedError(f"{name}: its decoder has failed, or needs too much memory")
    return pixels


def video_seconds(video: Any) -> float:
    """How long a file, or its bytes, lasts: its last frame's time. Errors as of `decoded`."""
    name = _name(video)
    patience = _Patience(name)
    with _asked(video, None, patience) as process, patience.with_each(process):
        answer = process.stdout.readline()  # type: ignore[union-attr]
    if not answer:
        raise UnsupportedError(f"{name}: its reader has failed, or needs too much memory")
    return float(answer)


def _name(video: Any) -> str:
    return printable(fspath(video), 1000) if isinstance(video, (str, PathLike)) else "the video"


@contextmanager
def _asked(
    video: Any, question: dict[str, Any] | None, patience: _Patience
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, at work; at the end its warnings and errors are told."""
    path, data = None, b""
    if isinstance(video, (str, PathLike)):
        _require_file(Path(video), _name(video))
        path = fspath(Path(video).absolute())
    else:
        data = video.read() if hasattr(video, "read") else video
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ValueError(f"video: expected a binary file, found one of {type(data).__name__}")
    asked = json.dumps({"path": path, "frames": question})
    command = [sys.executable, "-m", "qwen2vl_q.vision.video_process", asked]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        try:
            with patience.with_each(process):
                with suppress(BrokenPipeError):  # it says why
                    process.stdin.write(data)  # type: ignore[union-attr]
                with suppress(BrokenPipeError):
                    process.stdin.close()  # type: ignore[union-attr]
            yield process
            with patience.with_each(process):
                process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        messages.seek(0)
        _tell(messages.read().decode("utf-8", "replace"), _name(video))


def _require_file(path: Path, name: str) -> None:
    """The errors of opening it are this process's."""
    if not path.is_file() and path.exists():
        raise OSError(f"{name}: not a file")
    with path.open("rb"):
        pass


def _received(process: subprocess.Popen[bytes], patience: _Patience) -> NDArray[np.uint8] | None:
    """None where it has ended before the first frame."""
    output: Any = process.stdout
    with patience.with_each(process):
        header = output.readline()
    if not header:
        return None
    count, height, width = json.loads(header)
    pixels = np.empty((count, height, width, 3), np.uint8)
    for i, frame in enumerate(pixels):
        with patience.with_each(process):
            complete = output.readinto(frame.data) == frame.nbytes
        if not complete:
            if i == 0:
                return None
            pixels[i : i + i % FRAME_FACTOR] = pixels[i - 1]
            return pixels[: i + i % FRAME_FACTOR]
    return pixels


class _Patience:
    """How long a process is waited for: so long for each frame, and `seconds` in all, if there are any."""

    def __init__(self, name: str, seconds: float | None = None) -> None:
        self._name = name
        self._seconds = seconds
        self._end = inf if seconds is None else monotonic() + seconds

    @contextmanager
    def with_each(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        """UnsupportedError, and the process's end, where what is waited for does not come in time."""
        late = Event()

        def end() -> None:
            late.set()
            process.kill()

        left = self._end - monotonic()
        timer = Timer(max(0.0, min(SECONDS_A_FRAME, left)), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        if late.is_set() and left < SECONDS_A_FRAME:
            raise UnsupportedError(f"{self._name}: not decoded within {self._seconds:g} seconds")
        if late.is_set():
            raise UnsupportedError(f"{self._name}: no frame within {SECONDS_A_FRAME:g} seconds")


_ERRORS = {"unsupported": UnsupportedError, "damaged": FormatError, "invalid": ValueError}


def _tell(messages: str, name: str) -> None:
    """Its warnings; raises its error."""
    for line in messages.splitlines():
        kind, _, message = line.partition(": ")
        if kind == "warning":
            warnings.warn(f"{name}: {printable(message, 300)}", stacklevel=5)
        elif kind in _ERRORS:
            raise _ERRORS[kind](f"{name}: {printable(message, 300)}")
