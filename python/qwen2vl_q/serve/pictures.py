"""The pictures of a request: counted, bounded and read before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2vl_q.chat.messages import ImagePart, read_part
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve.errors import HttpError
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.vision.fetch import Fetcher
from qwen2vl_q.vision.image_processor import ProcessedImage, encoded_size

_KINDS = ("image", "image_url")
_CLIPS = ("video", "video_url", "input_video")


class PictureReader:
    """Of one server. fetcher: of addresses that clients may name; None: of none."""

    def __init__(self, model: Qwen2VL, limits: Limits, fetcher: Fetcher | None) -> None:
        self._model = model
        self._limits = limits
        self._fetch = fetcher.fetch if fetcher is not None else _fetch_nothing

    def read(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages, with processed pictures in place of addresses. Never a file of this machine.

        HttpError, ValueError, OSError or Qwen2VLError for what is refused.
        """
        count = sum(_is_picture(part) for message in messages for part in _parts(message))
        if count > self._limits.images:
            raise HttpError(
                400, f"messages: expected at most {self._limits.images} pictures, found {count}", "messages"
            )
        room = self._limits.visual_tokens
        found = []
        for i, message in enumerate(messages):
            parts: list[Any] = []
            for j, part in enumerate(_parts(message)):
                if isinstance(part, Mapping) and part.get("type") in _CLIPS:
                    raise ValueError(f"message {i}, part {j}: clips are not served; send frames as pictures")
                if _is_picture(part):
                    picture = self._load(part, f"message {i}, part {j}", room)
                    room -= math.prod(picture.grid_thw) // self._model.image_processor.merge_size**2
                    part = {"type": "image", "image": picture}
                parts.append(part)
            found.append({**message, "content": parts} if parts else message)
        return found

    def _load(self, part: Mapping[str, Any], where: str, room: int) -> ProcessedImage:
        asked = read_part(part, where, self._fetch)
        assert isinstance(asked, ImagePart)
        if not isinstance(asked.image, bytes):  # a path, which nobody has read
            raise ValueError(f"{where}: expected a data: URI or an http(s) address")
        width, height = encoded_size(asked.image, where)
        if width * height > self._limits.pixels:
            raise HttpError(
                400,
                f"{where}: expected at most {self._limits.pixels} pixels, found {width} x {height}",
                "messages",
            )
        sizes = asked.min_pixels, asked.max_pixels, asked.resized, asked.detail
        return self._model.load_image(asked.image, *sizes, max_tokens=room)


def _fetch_nothing(address: str, where: str) -> bytes:
    raise ValueError(f"{where}: this server fetches nothing; send the picture as a data: URI")


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _KINDS
