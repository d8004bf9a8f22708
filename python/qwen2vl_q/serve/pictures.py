"""The pictures and clips of a request: counted, bounded and read before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.chat.messages import ImagePart, VideoPart, read_part
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve.errors import HttpError
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.vision.fetch import Fetcher
from qwen2vl_q.vision.image_processor import ProcessedImage, encoded_size

_KINDS = ("image", "image_url")
_CLIPS = ("video", "video_url")


class PictureReader:
    """Of one server. fetcher: of addresses that clients may name; None: of none."""

    def __init__(self, model: Qwen2VL, limits: Limits, fetcher: Fetcher | None) -> None:
        self._model = model
        self._limits = limits
        self._fetch = fetcher.fetch if fetcher is not None else _fetch_nothing

    def read(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, with processed pictures and clips in place of addresses. Never a file from here.

        HttpError, ValueError, OSError or Qwen2VLError for what is refused.
        """
        count = sum(_picture_count(part) for message in messages for part in _parts(message))
        if count > self._limits.images:
            raise HttpError(
                400, f"messages: expected at most {self._limits.images} pictures, found {count}", "messages"
            )
        room = self._limits.visual_tokens
        found = []
        for i, message in enumerate(messages):
            parts: list[Any] = []
            for j, part in enumerate(_parts(message)):
                if _picture_count(part):
                    where, kind = f"message {i}, part {j}", "video" if _is_clip(part) else "image"
                    seen = (self._clip if kind == "video" else self._picture)(part, where, room)
                    room -= math.prod(seen.grid_thw) // self._model.image_processor.merge_size**2
                    part = {"type": kind, kind: seen}
                parts.append(part)
            found.append({**message, "content": parts} if parts else message)
        return found

    def _picture(self, part: Mapping[str, Any], where: str, room: int) -> ProcessedImage:
        asked = read_part(part, where, self._fetch)
        assert isinstance(asked, ImagePart)
        self._require_bounded(asked.image, where)
        sizes = asked.min_pixels, asked.max_pixels, asked.resized, asked.detail
        return self._model.load_image(asked.image, *sizes, max_tokens=room)

    def _clip(self, part: Mapping[str, Any], where: str, room: int) -> ProcessedImage:
        """Of frames so few and small that half of a context holds them."""
        asked = read_part(part, where, self._fetch)
        assert isinstance(asked, VideoPart)
        if isinstance(asked.video, list):
            for i, frame in enumerate(asked.video):
                self._require_bounded(frame, f"{where}, frame {i}")
        else:
            _require_read(asked.video, where)
        budget = max(1, min(room, self._model.n_ctx // 2))
        try:
            return self._model.load_video(
                asked.video, asked.options, budget, room, self._limits.video_seconds
            )
        except (ValueError, FormatError, UnsupportedError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _require_bounded(self, picture: Any, where: str) -> None:
        width, height = encoded_size(_require_read(picture, where), where)
        if width * height > self._limits.pixels:
            raise HttpError(
                400,
                f"{where}: expected at most {self._limits.pixels} pixels, found {width} x {height}",
                "messages",
            )


def has_clips(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(_is_clip(part) for message in messages for part in _parts(message))


def _fetch_nothing(address: str, where: str) -> bytes:
    raise ValueError(f"{where}: this server fetches nothing; send the picture as a data: URI")


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _require_read(file: Any, where: str) -> bytes:
    """ValueError for a path, which nobody has read."""
    if not isinstance(file, bytes):
        raise ValueError(f"{where}: expected a data: URI or an http(s) address")
    return file


def _is_clip(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _CLIPS


def _picture_count(part: Any) -> int:
    """A list of frames counts each."""
    if _is_clip(part):
        frames = part.get("video")
        return max(1, len(frames)) if isinstance(frames, list) else 1
    return int(isinstance(part, Mapping) and part.get("type") in _KINDS)
