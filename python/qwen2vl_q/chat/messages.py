"""Conversations as transformers and the OpenAI API write them -> one plain form.

A message is {"role": ..., "content": text or a list of parts}; a part is one of
    {"type": "text", "text": text}
    {"type": "image", "image": picture}                  also with the key "url", "path" or "base64"
    {"type": "image_url", "image_url": {"url": address}}  or the address itself
where a picture is what `Qwen2VL.encode_image` takes, a path from ~, a file:// address or a data: URI. An
image part may bound its size by "min_pixels" and "max_pixels". Other keys are refused, but for those that are
None and the details "auto" and "high" of an image_url. Nothing is fetched from the network.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.printable import printable
from qwen2vl_q.vision.image_processor import MAX_BOUND, ImageInput, require_image

ROLES = ("system", "user", "assistant")
MAX_DATA_URI_BYTES = 64 * 1024 * 1024  # decoded; a 50-megapixel JPEG of the best quality stays below
MAX_PATH_CHARS = 4096  # more is something else: a picture as base64
_BASE64_CHARS = MAX_DATA_URI_BYTES // 3 * 4 + 4
_CHUNK = 2**20
_HEX = np.full(256, 255, np.uint8)  # of a character, the digit
_HEX[list(b"0123456789abcdef")] = _HEX[list(b"0123456789ABCDEF")] = np.arange(16)

# Keys of other programs, and what says the same here.
_ELSEWHERE = {
    "images": """write each picture as a part of content, {"type": "image", "image": ...}""",
    "resized_height": "bound the size by min_pixels and max_pixels",
    "resized_width": "bound the size by min_pixels and max_pixels",
    "detail": "it belongs beside url; max_pixels bounds the size",
    "name": "write it into the content",
    "tool_calls": "tools are not supported",
}


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

    @property
    def texts(self) -> list[str]:
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content if isinstance(part, TextPart)]

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
                f"{where}: nothing is fetched from the network; "
                f"download {printable(source)} and give its path"
            )
        if scheme.startswith("file:"):
            try:
                parts = urlsplit(source)
            except ValueError:
                raise ValueError(f"{where}: expected a file:// address, found {printable(source)}") from None
            if parts.netloc not in ("", "localhost"):
                raise ValueError(f"{where}: a file:// address of another machine ({printable(parts.netloc)})")
            from urllib.request import url2pathname  # brings ssl in: a fiftieth of a second, 5 MB

            return url2pathname(parts.path)
        return _path(source, where)
    try:
        require_image(source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    picture: ImageInput = source
    return picture


def _path(source: str, where: str) -> str:
    """With ~ for the user's home, where no file is called so."""
    if len(source) > MAX_PATH_CHARS:
        raise ValueError(
            f"{where}: expected a path, found {len(source)} characters; "
            "give base64 as a data: URI or by the key base64"
        )
    if source.startswith("~") and not Path(source).exists():
        return os.path.expanduser(source)  # noqa: PTH111 (Path's own raises for an unknown user)
    return source


def _message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a dict with role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: expected the role {', '.join(ROLES)}, found {printable(role)}")
    _require_known(message, ("role", "content"), where)
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
        _require_known(part, ("type", "text"), where)
        return TextPart(text)
    if kind == "image":
        keys = [key for key in ("image", "url", "path", "base64") if part.get(key) is not None]
        if len(keys) != 1:
            raise ValueError(f"{where}: expected one of image, url, path and base64, found {keys or 'none'}")
        _require_known(part, ("type", *keys, "min_pixels", "max_pixels"), where)
        source = part[keys[0]]
        if keys[0] == "base64":
            return _image_part(_from_base64(source, where), part, where)
        return _image_part(read_source(source, where), part, where)
    if kind == "image_url":
        _require_known(part, ("type", "image_url", "min_pixels", "max_pixels"), where)
        address = part.get("image_url")
        if isinstance(address, Mapping):
            _require_known(address, ("url", "detail"), f"{where}, image_url")
            if address.get("detail") not in (None, "auto", "high"):
                raise ValueError(
                    f"{where}: expected the detail auto or high, found {printable(address['detail'])}; "
                    "max_pixels bounds the size"
                )
            address = address.get("url")
        if not isinstance(address, str):
            raise ValueError(f"{where}: expected image_url with a url, found {type(address).__name__}")
        return _image_part(read_source(address, where), part, where)
    raise ValueError(f"{where}: expected the type text, image or image_url, found {printable(kind)}")


def _require_known(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """ValueError for another key with a value."""
    for key, value in found.items():
        if key not in known and value is not None:
            hint = f"; {_ELSEWHERE[key]}" if key in _ELSEWHERE else ""
            raise ValueError(f"{where}: unknown key {printable(key)}{hint}")


def _image_part(image: ImageInput, part: Mapping[str, Any], where: str) -> ImagePart:
    limits = [
        None if part.get(key) is None else integer(f"{where}: {key}", part[key], 1, MAX_BOUND)
        for key in ("min_pixels", "max_pixels")
    ]
    return ImagePart(image, limits[0], limits[1])


def _data_uri(uri: str, where: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError(f"{where}: a data: URI without a comma")
    is_base64 = header.lower().endswith(";base64")
    # A percent-encoded byte takes three characters.
    if len(payload) - 2 * payload.count("%") > (_BASE64_CHARS if is_base64 else MAX_DATA_URI_BYTES):
        raise _too_large(where)
    data = _unquoted(payload)
    return _from_base64(data.decode("latin-1"), where) if is_base64 else data


def _unquoted(text: str) -> bytes:
    """As `unquote_to_bytes`, which takes some 80 bytes of memory for each encoded one."""
    data = text.encode()
    if b"%" not in data:
        return data
    decoded = bytearray()
    start = 0
    while start < len(data):
        end = start + _CHUNK
        cut = data.rfind(b"%", end - 2, end)
        end = cut if cut >= 0 else end
        decoded += _unquoted_chunk(np.frombuffer(data, np.uint8)[start:end])
        start = end
    return bytes(decoded)


def _unquoted_chunk(data: NDArray[np.uint8]) -> bytes:
    first, second = _HEX[data[1:-1]], _HEX[data[2:]]
    at = np.flatnonzero((data[:-2] == ord("%")) & (first < 16) & (second < 16))
    decoded = data.copy()
    decoded[at] = first[at] * 16 + second[at]
    kept = np.ones(len(data), bool)
    kept[at + 1] = kept[at + 2] = False
    return decoded[kept].tobytes()


def _from_base64(text: Any, where: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected base64 as a string, found {type(text).__name__}")
    if len(text) > _BASE64_CHARS:
        raise _too_large(where)
    try:
        return base64.b64decode(text.encode("ascii").translate(None, b" \t\r\n\f\v"), validate=True)
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not base64: {printable(text[error.start])}") from None
    except binascii.Error as error:
        raise ValueError(f"{where}: not base64: {error}") from None


def _too_large(where: str) -> ValueError:
    return ValueError(f"{where}: more than {MAX_DATA_URI_BYTES // 2**20} MiB in a data: URI")
