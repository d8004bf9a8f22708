"""Conversations as transformers and the OpenAI API write them -> one plain form.

A message is {"role": ..., "content": text or a list of parts}; a part is one of
    {"type": "text", "text": text}
    {"type": "image", "image": picture}                  also with the key "url", "path" or "base64"
    {"type": "image_url", "image_url": {"url": address}}  or the address itself
where a picture is what `Qwen2VL.encode_image` takes, a file:// address or a data: URI. An image part may
bound its size by "min_pixels" and "max_pixels". Nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from qwen2vl_q.image_processor import ImageInput, ProcessedImage

ROLES = ("system", "user", "assistant")
MAX_DATA_URI_BYTES = 64 * 1024 * 1024  # decoded; a 50-megapixel JPEG of the best quality stays below


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    image: ImageInput
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, eq=False)
class Message:
    role: str
    content: str | tuple[TextPart | ImagePart, ...]

    @property
    def images(self) -> list[ImagePart]:
        return [part for part in self.content if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, without the pictures themselves."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        parts = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": "image", "image": ""}
            for part in self.content
        ]
        return {"role": self.role, "content": parts}


def normalize(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Checks a conversation. ValueError naming the message's (and part's) index for what is not as above."""
    if isinstance(messages, (str, bytes, Mapping)):
        raise ValueError(f"messages must be a list of messages, found {type(messages).__name__}")
    normalized = [_message(message, f"message {i}") for i, message in enumerate(messages)]
    if not normalized:
        raise ValueError("messages must not be empty")
    return normalized


def read_source(source: Any, where: str = "image") -> ImageInput:
    """A picture from what a message names it by. ValueError for an http(s) address: nothing is fetched."""
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _data_uri(source, where)
        if scheme.startswith(("http:", "https:")):
            raise ValueError(
                f"{where}: nothing is fetched from the network; download {source[:200]} and give its path"
            )
        if scheme.startswith("file:"):
            parts = urlsplit(source)
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"{where}: a file:// address of another machine ({parts.netloc})")
            from urllib.request import url2pathname  # brings ssl in: a fiftieth of a second, 5 MB

            return url2pathname(parts.path)
    if isinstance(source, (str, bytes, PathLike, Image.Image, np.ndarray, ProcessedImage)):
        return source
    raise ValueError(
        f"{where}: expected a path, bytes, a PIL image or a uint8 array, found {type(source).__name__}"
    )


def _message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a dict with role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: expected the role {', '.join(ROLES)}, found {role!r}")
    if isinstance(content, str):
        return Message(role, content)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(
            f"{where}: expected content as text or a list of parts, found {type(content).__name__}"
        )
    return Message(role, tuple(_part(part, f"{where}, part {i}") for i, part in enumerate(content)))


def _part(part: Any, where: str) -> TextPart | ImagePart:
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: expected a dict, found {type(part).__name__}")
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected text as a string, found {type(text).__name__}")
        return TextPart(text)
    if kind == "image":
        keys = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if len(keys) != 1:
            raise ValueError(f"{where}: expected one of image, url, path and base64, found {keys or 'none'}")
        source = part[keys[0]]
        if keys[0] == "base64":
            return _image_part(_from_base64(source, where), part, where)
        return _image_part(read_source(source, where), part, where)
    if kind == "image_url":
        address = part.get("image_url")
        if isinstance(address, Mapping):
            address = address.get("url")
        if not isinstance(address, str):
            raise ValueError(f"{where}: expected image_url with a url, found {type(address).__name__}")
        return _image_part(read_source(address, where), part, where)
    raise ValueError(f"{where}: expected the type text, image or image_url, found {kind!r}")


def _image_part(image: ImageInput, part: Mapping[str, Any], where: str) -> ImagePart:
    limits = []
    for key in ("min_pixels", "max_pixels"):
        limit = part.get(key)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ValueError(f"{where}: expected {key} as a positive integer, found {limit!r}")
        limits.append(limit)
    return ImagePart(image, limits[0], limits[1])


def _data_uri(uri: str, where: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"{where}: a data: URI without a comma")
    if header.lower().endswith(";base64"):
        return _from_base64(unquote(payload) if "%" in payload else payload, where)
    if len(payload) > 3 * MAX_DATA_URI_BYTES:  # percent-encoding triples at most
        raise _too_large(where)
    return unquote_to_bytes(payload)


def _from_base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected base64 as a string, found {type(text).__name__}")
    if len(text) > MAX_DATA_URI_BYTES // 3 * 4 + 4:
        raise _too_large(where)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{where}: not base64: {error}") from None


def _too_large(where: str) -> ValueError:
    return ValueError(f"{where}: more than {MAX_DATA_URI_BYTES // 2**20} MiB in a data: URI")
