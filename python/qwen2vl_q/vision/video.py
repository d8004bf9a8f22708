"""Clips -> the vision tower's input, by the rules of qwen-vl-utils: which frames, and how large.

Files are decoded as a stream by PyAV (extra: video); what is not wanted is dropped at once.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.image_processor import ImageProcessor, Picture, ProcessedImage, load_image, smart_resize

# qwen_vl_utils/vision_process.py
FPS = 2.0
FRAME_FACTOR = 2
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28  # of a frame
TOTAL_PIXELS = 24576 * 28 * 28  # of all frames

MAX_SIDE = 16384  # of a frame as a file has it
MAX_FILE_FRAMES = 2**24  # some three days at 60 a second

VideoInput: TypeAlias = "str | PathLike[str] | bytes | IO[bytes] | Sequence[Picture] | ProcessedImage"


@dataclass(frozen=True)
class VideoOptions:
    """fps: frames a second; nframes: so many instead. start, end: seconds. Pixels are a frame's, but for
    total_pixels; resized: (height, width) to come near to."""

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


@dataclass(frozen=True)
class Frames:
    """The frames that are shown, upright RGB, and the seconds at which they stand in the clip."""

    pictures: list[Image.Image]
    seconds: list[float]
    fps: float  # of the sample


def frame_count(total: int, file_fps: float, options: VideoOptions) -> int:
    """How many of a clip's frames are shown, an even number. ValueError for fewer than two of them."""
    if options.nframes is not None:
        count = round(options.nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        fewest = math.ceil((options.min_frames or MIN_FRAMES) / FRAME_FACTOR) * FRAME_FACTOR
        most = (options.max_frames or min(MAX_FRAMES, total)) // FRAME_FACTOR * FRAME_FACTOR
        asked = total / file_fps * (options.fps or FPS)
        count = int(min(max(asked, fewest), most, total)) // FRAME_FACTOR * FRAME_FACTOR
    if not FRAME_FACTOR <= count <= total:
        raise ValueError(f"expected {FRAME_FACTOR} to {total} frames of the clip, found {count}")
    return count


def frame_indices(total: int, count: int) -> list[int]:
    return [round(float(i)) for i in np.linspace(0, total - 1, count)]


def frame_size(width: int, height: int, count: int, factor: int, options: VideoOptions) -> tuple[int, int]:
    """(height, width) of each of `count` frames."""
    if options.resized is not None:
        return smart_resize(*options.resized, factor)
    least = options.min_pixels or MIN_PIXELS
    total = options.total_pixels or TOTAL_PIXELS
    most = max(min(MAX_PIXELS, total / count * FRAME_FACTOR), int(least * 1.05))
    if options.max_pixels is not None:
        most = min(options.max_pixels, most)
    return smart_resize(height, width, factor, least, int(most))


def process_video(
    video: VideoInput, processor: ImageProcessor, options: VideoOptions, max_tokens: int | None = None
) -> ProcessedImage:
    """A clip as the tower sees it: pixels uint8 [frames, height, width, 3] with an even number of frames.

    video: a file, an encoded file's bytes, or pictures in a row, which all count. Errors of `read_frames`,
    and ValueError for more than max_tokens.
    """
    if isinstance(video, ProcessedImage):
        return video
    frames = read_frames(video, options)
    pictures = frames.pictures
    if len(pictures) % processor.temporal_patch_size:
        pictures = [*pictures, pictures[-1]]
    factor = processor.patch_size * processor.merge_size
    height, width = frame_size(*pictures[0].size, len(pictures), factor, options)
    steps = len(pictures) // processor.temporal_patch_size
    tokens = steps * height * width // factor**2
    if max_tokens is not None and tokens > max_tokens:
        raise ValueError(
            f"a clip of {len(pictures)} frames takes {tokens} tokens ({width} x {height} pixels), but the "
            f"context has room for {max_tokens}; fewer frames (fps, max_frames) or a lower max_pixels help"
        )
    pixels = np.empty((len(pictures), height, width, 3), np.uint8)
    for out, picture in zip(pixels, pictures, strict=True):
        out[:] = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    digest = hashlib.blake2b(f"video {pixels.shape}:".encode(), digest_size=16)
    digest.update(pixels.data)
    grid = steps, height // processor.patch_size, width // processor.patch_size
    return ProcessedImage(pixels, grid, digest.digest())


def read_frames(video: Any, options: VideoOptions) -> Frames:
    """The frames of a clip that are shown. Of a file that ends early or is damaged, those before it, with a
    warning.

    OSError for a file that cannot be read, FormatError for one without pictures, UnsupportedError where PyAV
    is missing or frames are too large, ValueError for options that leave nothing.
    """
    if isinstance(video, (list, tuple)):
        if not video:
            raise ValueError("a video of no frames")
        if len(video) > MAX_FRAMES:
            raise ValueError(f"expected at most {MAX_FRAMES} frames, found {len(video)}")
        pictures = [load_image(frame) for frame in video]
        if any(picture.size != pictures[0].size for picture in pictures):
            raise ValueError("expected frames of one size")
        fps = options.fps or FPS
        return Frames(pictures, [i / fps for i in range(len(pictures))], fps)
    found = _Animation.of(video) or _File(video)
    return found.sample(options)


class _Clip:
    """A file's frames: when they are shown, and those that are wanted."""

    name = "the video"

    def times(self) -> list[float]:
        """In order, from 0 on."""
        raise NotImplementedError

    def pictures(self, wanted: Sequence[float]) -> list[Image.Image]:
        """The frames shown at these times; fewer where the file ends before."""
        raise NotImplementedError

    def sample(self, options: VideoOptions) -> Frames:
        times = self.times()
        if not times:
            raise FormatError(f"{self.name}: no pictures in it")
        start, end = options.start or 0.0, math.inf if options.end is None else options.end
        within = [t for t in times if start <= t <= end]
        if not within:
            raise ValueError(f"{self.name}: no frames within {start:g} to {end:g} seconds")
        if len(within) == 1:
            within *= FRAME_FACTOR  # shown twice
        seconds = within[-1] - within[0]
        file_fps = (len(within) - 1) / seconds if seconds > 0 else FPS
        count = frame_count(len(within), file_fps, options)
        wanted = [within[i] for i in frame_indices(len(within), count)]
        pictures = self.pictures(wanted)
        if not pictures:
            raise FormatError(f"{self.name}: none of its frames can be decoded")
        if len(pictures) < count:
            self._warn(f"{len(pictures)} of {count} frames are shown")
        return Frames(pictures, wanted[: len(pictures)], count / seconds if seconds > 0 else FPS)

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.name}: it ends early or is damaged: {what}", stacklevel=5)


class _Animation(_Clip):
    """GIF, APNG or WebP, which Pillow reads with their times."""

    _SECONDS = 0.1  # of a frame that does not say

    def __init__(self, picture: Image.Image, name: str) -> None:
        self._picture = picture
        self.name = name

    @classmethod
    def of(cls, source: Any) -> _Animation | None:
        """None for other files."""
        name = printable(fspath(source), 1000) if isinstance(source, (str, PathLike)) else cls.name
        try:
            file: Any = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
            picture = Image.open(file, formats=("GIF", "PNG", "WEBP"))
            if getattr(picture, "n_frames", 1) > 1:
                return cls(picture, name)
            picture.close()
        except FileNotFoundError:
            raise
        except Exception:  # what Pillow's parsers meet in other files
            pass
        return None

    def times(self) -> list[float]:
        found, at = [], 0.0
        for i in range(min(getattr(self._picture, "n_frames", 1), MAX_FILE_FRAMES)):
            try:
                self._picture.seek(i)
            except Exception:
                self._warn(f"{i} frames can be read")
                break
            found.append(at)
            at += self._picture.info.get("duration", 0) / 1000 or self._SECONDS
        self._times = found
        return found

    def pictures(self, wanted: Sequence[float]) -> list[Image.Image]:
        found = []
        with self._picture:
            for time in wanted:
                try:
                    self._picture.seek(self._times.index(time))
                    found.append(load_image(self._picture.copy()))
                except Exception:
                    break
        return found


class _File(_Clip):
    """What FFmpeg reads."""

    def __init__(self, source: Any) -> None:
        try:
            import av
        except ImportError:
            raise UnsupportedError("video needs another package: pip install 'qwen2vl-q[video]'") from None
        self._av = av
        self.name = (
            "the video" if not isinstance(source, (str, PathLike)) else printable(fspath(source), 1000)
        )
        self._source = io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source
        if isinstance(source, (str, PathLike)):
            Path(source).stat()

    def _opened(self) -> Any:
        if hasattr(self._source, "seek"):
            self._source.seek(0)
        try:
            container = self._av.open(self._source if hasattr(self._source, "read") else fspath(self._source))
        except (self._av.FFmpegError, ValueError) as error:
            raise FormatError(f"{self.name}: not a video: {printable(str(error), 200)}") from None
        if not container.streams.video:
            container.close()
            raise FormatError(f"{self.name}: no pictures in it")
        return container

    def times(self) -> list[float]:
        """By its packets: nothing is decoded."""
        times = []
        with self._opened() as container:
            stream = container.streams.video[0]
            if max(stream.width or 0, stream.height or 0) > MAX_SIDE:
                size = f"{stream.width} x {stream.height}"
                raise UnsupportedError(f"{self.name}: expected frames up to {MAX_SIDE} a side, found {size}")
            try:
                for packet in container.demux(stream):
                    if packet.pts is not None:
                        times.append(float(packet.pts * packet.time_base))
                    if len(times) > MAX_FILE_FRAMES:
                        raise UnsupportedError(f"{self.name}: more than {MAX_FILE_FRAMES} frames")
            except self._av.FFmpegError:
                pass  # what comes before counts; decoding tells of it
            declared = (container.duration or 0) / 1e6
        times.sort()
        begin = times[0] if times else 0.0
        if times and declared > 1.1 * (times[-1] - begin) + 1:
            self._warn(f"{times[-1] - begin:.1f} of {declared:.1f} seconds are there")
        return [t - begin for t in times]

    def pictures(self, wanted: Sequence[float]) -> list[Image.Image]:
        found: list[Image.Image] = []
        frames = self._decoded()
        at, frame = next(frames, (math.inf, None))
        for time in wanted:
            while frame is not None and at < time - 1e-4:
                at, frame = next(frames, (math.inf, None))
            if frame is None:
                break
            found.append(_upright(frame))
        return found

    def _decoded(self) -> Iterator[tuple[float, Any]]:
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            begin: float | None = None
            try:
                for frame in container.decode(stream):
                    if frame.pts is None:
                        continue
                    time = float(frame.pts * frame.time_base)
                    begin = time if begin is None else begin
                    yield time - begin, frame
            except self._av.FFmpegError:
                return


def _upright(frame: Any) -> Image.Image:
    picture: Image.Image = frame.to_image()
    turns = int(getattr(frame, "rotation", 0) or 0) % 360
    return picture.rotate(turns, expand=True) if turns else picture
