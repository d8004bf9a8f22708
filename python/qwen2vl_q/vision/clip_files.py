"""Files of moving pictures: when their frames are shown, and those that are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol

from PIL import Image

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.image_processor import load_image
from qwen2vl_q.vision.video import MAX_FILE_FRAMES

MAX_FRAME_PIXELS = 2**26  # 8192 x 8192
# FFmpeg's names: those of files. Playlists and the like, which name other files, are none.
FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,flv,ogg,asf,gif,h264,hevc,ivf,y4m,yuv4mpegpipe"
_EPSILON = 1e-4  # seconds


class Clip(Protocol):
    """damage: what has been found so far of a file that ends early; ""."""

    damage: str

    def times(self) -> list[float]:
        """Of its frames in order, from 0 on."""

    def pictures(self, wanted: Sequence[float]) -> Iterator[Image.Image]:
        """The frames shown at these times, of `times` and in order, upright RGB; fewer where the file ends
        before."""


def open_clip(file: IO[bytes]) -> Clip:
    """FormatError for what is none, UnsupportedError where PyAV is missing."""
    return _Animation.of(file) or _Film(file)


class _Animation:
    """GIF, APNG or WebP, which Pillow reads with their times."""

    damage = ""

    _SECONDS = 0.1  # of a frame that does not say

    def __init__(self, picture: Image.Image) -> None:
        self._picture = picture
        self._times: list[float] = []

    @classmethod
    def of(cls, file: IO[bytes]) -> _Animation | None:
        """None for other files."""
        try:
            picture = Image.open(file, formats=("GIF", "PNG", "WEBP"))
            if getattr(picture, "n_frames", 1) > 1:
                return cls(picture)
        except Exception:  # what Pillow's parsers meet in other files
            pass
        file.seek(0)
        return None

    def times(self) -> list[float]:
        _require_size(*self._picture.size)
        at = 0.0
        count = getattr(self._picture, "n_frames", 1)
        if count > MAX_FILE_FRAMES:
            raise UnsupportedError(f"more than {MAX_FILE_FRAMES} frames")
        for i in range(count):
            try:
                self._picture.seek(i)
                self._picture.load()  # WebP's times are known then
            except Exception:
                self.damage = f"{i} frames can be read"
                break
            self._times.append(at)
            at += self._picture.info.get("duration", 0) / 1000 or self._SECONDS
        return self._times

    def pictures(self, wanted: Sequence[float]) -> Iterator[Image.Image]:
        for time in wanted:
            try:
                self._picture.seek(self._times.index(time))
                picture = load_image(self._picture.copy())
            except Exception:
                return
            yield picture


class _Film:
    """What FFmpeg reads."""

    damage = ""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            import av
        except ImportError:
            raise UnsupportedError("video needs another package: pip install 'qwen2vl-q[video]'") from None
        av.logging.set_level(None)
        self._av = av
        self._file = file
        self._keys: list[float] = []  # of frames that decoding can begin with
        self._begin = 0.0

    def _opened(self) -> Any:
        self._file.seek(0)
        try:
            container = self._av.open(self._file, options={"format_whitelist": FORMATS})
        except (self._av.FFmpegError, ValueError, UnicodeDecodeError) as error:
            raise FormatError(f"not a video: {printable(str(error), 200)}") from None
        if not container.streams.video:
            container.close()
            raise FormatError("no pictures in it")
        return container

    def times(self) -> list[float]:
        """By its packets: nothing is decoded."""
        times, keys = [], []
        with self._opened() as container:
            stream = container.streams.video[0]
            _require_size(stream.width or 0, stream.height or 0)
            try:
                for packet in container.demux(stream):
                    if packet.pts is not None:
                        times.append(float(packet.pts * packet.time_base))
                        if packet.is_keyframe:
                            keys.append(times[-1])
                    if len(times) > MAX_FILE_FRAMES:
                        raise UnsupportedError(f"more than {MAX_FILE_FRAMES} frames")
            except self._av.FFmpegError:
                pass  # what comes before counts; decoding tells of it
            declared = (container.duration or 0) / 1e6
        times.sort()
        self._begin = times[0] if times else 0.0
        self._keys = sorted(key - self._begin for key in keys)
        found = [t - self._begin for t in times]
        if found and declared > 1.1 * found[-1] + 1:
            self.damage = f"{found[-1]:.1f} of {declared:.1f} seconds are there"
        return found

    def pictures(self, wanted: Sequence[float]) -> Iterator[Image.Image]:
        """Decodes on from one to the next, or from the last keyframe before it."""
        with self._opened() as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            frames = self._frames(container, stream)
            now, frame = next(frames, (0.0, None))
            for time in wanted:
                behind = bisect_right(self._keys, time + _EPSILON) - 1
                key = self._keys[behind] if behind >= 0 else 0.0
                if frame is not None and now < key - _EPSILON and self._seek(container, stream, key):
                    frames = self._frames(container, stream)
                    now, frame = next(frames, (0.0, None))
                    if frame is None or now > time + _EPSILON:  # an index that lies
                        self._keys = []
                        yield from self.pictures(wanted[wanted.index(time) :])
                        return
                while frame is not None and now < time - _EPSILON:
                    now, frame = next(frames, (0.0, None))
                if frame is None:
                    return
                yield _upright(frame)

    def _seek(self, container: Any, stream: Any, time: float) -> bool:
        try:
            container.seek(round((self._begin + time) / stream.time_base), stream=stream)
        except self._av.FFmpegError:
            return False
        return True

    def _frames(self, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
        try:
            for frame in container.decode(stream):
                if frame.pts is not None:
                    yield float(frame.pts * frame.time_base) - self._begin, frame
        except self._av.FFmpegError:
            return


def _require_size(width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise UnsupportedError(
            f"expected frames of {MAX_FRAME_PIXELS} pixels at most, found {width} x {height}"
        )


def _upright(frame: Any) -> Image.Image:
    picture: Image.Image = frame.to_image()
    turns = int(getattr(frame, "rotation", 0) or 0) % 360
    return picture.rotate(turns, expand=True) if turns else picture
