"""The pictures of a request: counted, bounded and read before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.messages import ImagePart, read_part
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.serve.errors import HttpError
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.vision.fetch import Fetcher
from qwen2vl_q.vision.image_processor import ProcessedImage, encoded_size

_KINDS = ("image", "image_url")
_SOURCES = ("image", "url", "path", "base64")


class PictureReader:
    """Of one server. fetcher: of addresses that clients may name; None: of none."""

    def __init__(self, model: Qwen2VL, limits: Limits, fetcher: Fetcher | None) -> None:
        self._model = model
        self._limits = limits
        self._fetcher = fetcher

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
                if isinstance(part, Mapping) and part.get("type") == "video":
                    raise ValueError(f"message {i}, part {j}: clips are not served; send frames as pictures")
                if _is_picture(part):
                    picture = self._load(part, f"message {i}, part {j}", room)
                    room -= math.prod(picture.grid_thw) // self._model.image_processor.merge_size**2
                    part = {"type": "image", "image": picture}
                parts.append(part)
            found.append({**message, "content": parts} if parts else message)
        return found

    def _load(self, part: Mapping[str, Any], where: str, room: int) -> ProcessedImage:
        asked = read_part(self._embedded(part, where), where)
        assert isinstance(asked, ImagePart)
        assert isinstance(asked.image, bytes)
        width, height = encoded_size(asked.image, where)
        if width * height > self._limits.pixels:
            raise HttpError(
                400,
                f"{where}: expected at most {self._limits.pixels} pixels, found {width} x {height}",
                "messages",
            )
        sizes = asked.min_pixels, asked.max_pixels, asked.resized, asked.detail
        return self._model.load_image(asked.image, *sizes, max_tokens=room)

    def _embedded(self, part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The part with its picture in it. ValueError for one that names a file."""
        if part["type"] == "image" and part.get("base64") is not None and not _others(part):
            return part
        key, address = _address(part, where)
        scheme = address[:8].lower()
        if scheme.startswith("data:"):
            return part
        if not scheme.startswith(("http:", "https:")):
            raise ValueError(f"{where}: expected a data: URI or an http(s) address")
        if self._fetcher is None:
            raise ValueError(f"{where}: this server fetches nothing; send the picture as a data: URI")
        sizes = {name: value for name, value in part.items() if name not in ("type", key, "image_url")}
        if isinstance(inner := part.get("image_url"), Mapping):
            sizes |= {name: value for name, value in inner.items() if name != "url"}
        return {"type": "image", "image": self._fetcher.fetch(address, where), **sizes}


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _is_picture(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _KINDS


def _others(part: Mapping[str, Any]) -> list[str]:
    return [key for key in ("image", "url", "path") if part.get(key) is not None]


def _address(part: Mapping[str, Any], where: str) -> tuple[str, str]:
    """By which key, and what it says."""
    if part["type"] == "image_url":
        inner = part.get("image_url")
        address = inner.get("url") if isinstance(inner, Mapping) else inner
        key = "image_url"
    else:
        keys = [key for key in _SOURCES if part.get(key) is not None]
        if len(keys) != 1 or keys[0] not in ("image", "url"):
            raise ValueError(f"{where}: expected one of image, url and base64, found {keys or 'none'}")
        [key] = keys
        address = part[key]
    if not isinstance(address, str):
        raise ValueError(
            f"{where}: expected an address as a string, found {printable(type(address).__name__)}"
        )
    return key, address
