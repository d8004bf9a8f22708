"""Clips that tests make."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CODECS = {
    "mp4": "libx264", "mov": "libx264", "matroska": "libx264", "mpegts": "libx264",
    "webm": "libvpx", "avi": "mpeg4",
}  # fmt: skip


def encoded(
    frames: Sequence[NDArray[np.uint8]], fps: int = 10, kind: str = "mp4", times: Sequence[int] | None = None
) -> bytes:
    """A file of frames [h, w, 3] in RGB; times: in units of 1 / fps, where they are not even."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream(_CODECS[kind], rate=fps)
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, fps)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def grey(level: int, size: tuple[int, int] = (64, 48)) -> NDArray[np.uint8]:
    return np.full((size[1], size[0], 3), level, np.uint8)


def fade(n: int, fps: int = 10, size: tuple[int, int] = (64, 48), kind: str = "mp4") -> bytes:
    """n frames from black to white."""
    return encoded([grey(i * 255 // max(1, n - 1), size) for i in range(n)], fps, kind)
