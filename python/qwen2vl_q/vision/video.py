"""Clips -> the vision tower's input, by the rules of qwen-vl-utils: which frames, and how large.

Files are decoded by `video_decoder`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import IO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.image_processor import (
    MAX_BOUND,
    ImageProcessor,
    Picture,
    ProcessedImage,
    load_image,
    smart_resize,
)

# qwen_vl_utils/vision_process.py
FPS = 2.0
FRAME_FACTOR = 2  # of the tower's temporal patches
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame
TOTAL_PIXELS = 24576 * 28 * 28  # of every second frame together

MAX_FILE_FRAMES = 2**24  # some three days at 60 a second

VideoInput: TypeAlias = "str | PathLike[str] | bytes | IO[bytes] | Sequence[Picture] | ProcessedImage"


@dataclass(frozen=True)
class VideoOptions:
    """fps: frames a second; nframes: so many instead. start, end: seconds. Pixels are a frame's, but for
    total_pixels, which every second frame shares; resized: (height, width) to come near to."""

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    start: float | None = None
    end: float | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.nframes is not None:
            raise ValueError("fps: expected it or nframes")
        for name in ("fps", "start", "end"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name}: expected a number of 0 or more, found {printable(value)}")
        if self.fps == 0:
            raise ValueError("fps: expected a number above 0, found 0")
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"end: expected it after start, found {self.end}")
        for name in ("nframes", "min_frames", "max_frames"):
            if (value := getattr(self, name)) is not None:
                integer(name, value, FRAME_FACTOR, MAX_FILE_FRAMES)
        for name in ("min_pixels", "max_pixels", "total_pixels"):
            if (value := getattr(self, name)) is not None:
                integer(name, value, 1, MAX_BOUND)


@dataclass(frozen=True)
class Plan:
    """What is shown of a clip: how many frames, an even number, and their size."""

    count: int
    height: int
    width: int

    def tokens(self, factor: int) -> int:
        return self.count // FRAME_FACTOR * self.height * self.width // factor**2


def frame_count(total: int, file_fps: float, options: VideoOptions) -> int:
    """How many of a clip's frames are shown, an even number. ValueError for fewer than two of them."""
    if options.nframes is not None:
        count = round(options.nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        fewest = math.ceil((options.min_frames or MIN_FRAMES) / FRAME_FACTOR) * FRAME_FACTOR
        most = (options.max_frames or min(MAX_FRAMES, total)) // FRAME_FACTOR * FRAME_FACTOR
        asked = total / file_fps * (options.fps or FPS)
        exact = min(max(asked, fewest), most, total)
        count = int(exact + 1e-6) // FRAME_FACTOR * FRAME_FACTOR  # the rate is computed from times
    if not FRAME_FACTOR <= count <= total:
        raise ValueError(f"expected {FRAME_FACTOR} to {total} frames of the clip, found {count}")
    return count


def frame_indices(total: int, count: int) -> list[int]:
    return [round(float(i)) for i in np.linspace(0, total - 1, count)]


def frame_size(width: int, height: int, count: int, factor: int, options: VideoOptions) -> tuple[int, int]:
    """(height, width) of each of `count` frames."""
    if options.resized is not None:
        return smart_resize(*options.resized, factor)
    least = options.min_pixels or (
        factor**2 if (options.max_pixels or MIN_PIXELS) < MIN_PIXELS else MIN_PIXELS
    )
    total = options.total_pixels or TOTAL_PIXELS
    most = max(min(MAX_PIXELS, total / count * FRAME_FACTOR), int(least * 1.05))
    if options.max_pixels is not None:
        most = min(options.max_pixels, most)
    return smart_resize(height, width, factor, least, int(most))


def plan(
    width: int,
    height: int,
    counts: Iterable[int],
    factor: int,
    options: VideoOptions,
    budget: int | None = None,
) -> Plan:
    """With the first of the counts, from large to small, of which frames take no more than `budget` tokens;
    where all take more, the last, and smaller frames than the options ask for."""
    if budget is not None:
        total = min(options.total_pixels or TOTAL_PIXELS, budget * factor**2)
        options = replace(options, total_pixels=total)
    for count in counts:
        found = Plan(count, *frame_size(width, height, count, factor, options))
        if budget is None or found.tokens(factor) <= budget:
            return found
    assert budget is not None
    share = budget * factor**2 // (found.count // FRAME_FACTOR)
    return Plan(found.count, *smart_resize(height, width, factor, min(factor**2, share), share))


def process_video(
    video: VideoInput,
    processor: ImageProcessor,
    options: VideoOptions,
    max_tokens: int | None = None,
    budget: int | None = None,
    seconds: float | None = None,
) -> ProcessedImage:
    """A clip as the tower sees it: pixels uint8 [frames, height, width, 3] with an even number of frames.

    video: a file (also an animated GIF, PNG or WebP), an encoded file's bytes, or pictures in a row, which
    all count. budget: of tokens, see `plan`. seconds: that decoding may take. Of a file that ends early or is
    damaged, the frames before that are shown, with a warning.

    OSError for a file that cannot be read, FormatError for one without pictures, UnsupportedError where PyAV
    is missing, or decoding takes too much time or memory, ValueError for options that leave nothing, and for
    more than max_tokens.
    """
    if isinstance(video, ProcessedImage):
        return video
    factor = processor.patch_size * processor.merge_size
    limit = max_tokens if budget is None else min(budget, max_tokens or budget)
    if isinstance(video, (list, tuple)):
        pixels = _of_pictures(video, factor, options, limit, budget)
    else:
        from qwen2vl_q.vision.video_decoder import decoded

        pixels = decoded(video, factor, options, limit, budget, seconds)
    digest = hashlib.blake2b(f"video {pixels.shape}:".encode(), digest_size=16)
    digest.update(pixels.data)
    count, height, width, _ = pixels.shape
    side = processor.patch_size
    return ProcessedImage(
        pixels, (count // processor.temporal_patch_size, height // side, width // side), digest.digest()
    )


def require_room(found: Plan, factor: int, max_tokens: int | None) -> None:
    """ValueError for more."""
    tokens = found.tokens(factor)
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(
            f"a clip of {found.count} frames takes {tokens} tokens ({found.width} x {found.height} pixels), "
            f"but there is room for {max_tokens}; fewer frames (fps, max_frames) or a lower max_pixels help"
        )


def _of_pictures(
    frames: Sequence[Picture], factor: int, options: VideoOptions, limit: int | None, budget: int | None
) -> NDArray[np.uint8]:
    if not frames:
        raise ValueError("a video of no frames")
    if len(frames) > MAX_FRAMES:
        raise ValueError(f"expected at most {MAX_FRAMES} frames, found {len(frames)}")
    first = load_image(frames[0])
    count = len(frames) + len(frames) % FRAME_FACTOR
    found = plan(*first.size, [count], factor, options, budget)
    require_room(found, factor, limit)
    pixels = np.empty((found.count, found.height, found.width, 3), np.uint8)
    for i, frame in enumerate(frames):  # each as large as it is only for now
        picture = load_image(frame) if i > 0 else first
        if picture.size != first.size:
            raise ValueError("expected frames of one size")
        pixels[i] = resized(picture, found)
    pixels[len(frames) :] = pixels[len(frames) - 1]
    return pixels


def resized(picture: Image.Image, found: Plan) -> NDArray[np.uint8]:
    return np.asarray(picture.resize((found.width, found.height), Image.Resampling.BICUBIC))
