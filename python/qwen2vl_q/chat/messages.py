"""Conversations as transformers and the OpenAI API write them -> one plain form.

A message is {"role": ..., "content": text or a list of parts}; a part is one of
    {"type": "text", "text": text}
    {"type": "image", "image": picture}                  also with the key "url", "path" or "base64"
    {"type": "image_url", "image_url": {"url": address}}  or the address itself
    {"type": "video", "video": clip}
    {"type": "video_url", "video_url": {"url": address}}  likewise
where a picture is what `Qwen2VL.encode_image` takes, a path from ~, a file:// address or a data: URI. An
image part may bound its size by "min_pixels" and "max_pixels", or ask for the one nearest to
"resized_height" x "resized_width" (as qwen-vl-utils does: in whole cells, within the model's own bounds).
"detail", of an image or beside the url, is "low", LOW_DETAIL_PIXELS at most, or "high" or "auto", the model's
own bounds.

A clip is a file, named as a picture's, or a list of pictures; beside it "fps" or "nframes", "min_frames",
"max_frames", "video_start", "video_end" (seconds), "min_pixels", "max_pixels" (of a frame), "total_pixels",
"resized_height" and "resized_width", as qwen-vl-utils has them.

The role "developer" is "system" by its later name. An assistant's message may have "tool_calls", [{"id": ...,
"type": "function", "function": {"name": ..., "arguments": JSON text or an object}}], and a result's is
{"role": "tool", "content": text, "tool_call_id": ...}. Other keys are refused, but for those that are None.
An http(s) address is fetched where the model has been told that it may (`fetch` of `from_gguf`).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.json_values import json_value
from qwen2vl_q.vision.image_processor import MAX_BOUND, ImageInput, ProcessedImage, require_image
from qwen2vl_q.vision.video import VideoInput, VideoOptions

Detail: TypeAlias = Literal["low", "high", "auto"]
Messages: TypeAlias = "Iterable[Mapping[str, Any]]"
Fetch: TypeAlias = "Callable[[str, str], bytes]"  # a file, of its address; whose it is, for errors

ROLES = ("system", "user", "assistant", "tool")
LOW_DETAIL_PIXELS = 512 * 512  # OpenAI's size; some 330 tokens
MAX_DATA_URI_BYTES = 64 * 1024 * 1024  # decoded; a 50-megapixel JPEG of the best quality stays below
MAX_PATH_CHARS = 4096  # more is something else: a picture as base64
_BASE64_CHARS = MAX_DATA_URI_BYTES // 3 * 4 + 4
_CHUNK = 2**20
_HEX = np.full(256, 255, np.uint8)  # of a character, the digit
_HEX[list(b"0123456789abcdef")] = _HEX[list(b"0123456789ABCDEF")] = np.arange(16)

_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width", "detail")

# Keys of other programs, and what says the same here.
_ELSEWHERE = {
    "images": """write each picture as a part of content, {"type": "image", "image": ...}""",
    "detail": "it belongs beside url",
    "name": "write it into the content",
    "tool_calls": "they are an assistant's",
    "tool_call_id": "it belongs to the role tool",
}


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    image: ImageInput
    min_pixels: int | None = None
    max_pixels: int | None = None
    resized: tuple[int, int] | None = None  # height, width
    detail: Detail | None = None

    def for_message(self) -> dict[str, Any]:
        """As a message has it."""
        height, width = self.resized or (None, None)
        sizes = (self.min_pixels, self.max_pixels, height, width, self.detail)
        asked = {key: value for key, value in zip(_SIZES, sizes, strict=True) if value is not None}
        return {"type": "image", "image": self.image, **asked}


@dataclass(frozen=True, eq=False)
class VideoPart:
    video: VideoInput
    options: VideoOptions = field(default_factory=VideoOptions)

    def for_message(self) -> dict[str, Any]:
        """As a message has it."""
        asked = {key: getattr(self.options, name) for key, name in _VIDEO_KEYS.items()}
        height, width = self.options.resized or (None, None)
        asked |= {"resized_height": height, "resized_width": width}
        given = {key: value for key, value in asked.items() if value is not None}
        return {"type": "video", "video": self.video, **given}


Visual: TypeAlias = "ImagePart | VideoPart"


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # a JSON object
    id: str = field(default="", compare=False)

    @property
    def parsed(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.arguments)
        return found

    def for_message(self) -> dict[str, Any]:
        """As a message's "tool_calls" hold it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, eq=False)
class Message:
    role: str
    content: str | tuple[TextPart | Visual, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def visuals(self) -> list[Visual]:
        """Pictures and clips."""
        return [part for part in self.content if isinstance(part, (ImagePart, VideoPart))]

    @property
    def text(self) -> str:
        """All of the content's."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def texts(self) -> list[str]:
        """That, and those of the calls."""
        return [self.text, *(call.arguments for call in self.tool_calls)]

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it, without the pictures themselves."""
        message: dict[str, Any] = {"role": self.role, "content": self._content_for_template()}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.parsed}}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    def _content_for_template(self) -> str | list[dict[str, str]]:
        if isinstance(self.content, str):
            return self.content
        return [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": (kind := "image" if isinstance(part, ImagePart) else "video"), kind: ""}
            for part in self.content
        ]


def normalize(messages: Messages, fetch: Fetch | None = None) -> list[Message]:
    """Checks a conversation. fetch: of http(s) addresses. ValueError naming the message's (and part's) index
    for what is not as above."""
    if isinstance(messages, (str, bytes, Mapping)):
        raise ValueError(f"messages must be a list of messages, found {type(messages).__name__}")
    normalized = [_message(message, f"message {i}", fetch) for i, message in enumerate(messages)]
    if not normalized:
        raise ValueError("messages must not be empty")
    return normalized


def read_source(source: Any, where: str = "image", fetch: Fetch | None = None) -> ImageInput:
    """A picture from what a message names it by. fetch: of an http(s) address; ValueError for one without."""
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _data_uri(source, where)
        if scheme.startswith(("http:", "https:")):
            if fetch is None:
                raise ValueError(
                    f"{where}: nothing is fetched from the network (from_gguf(..., fetch=True) allows it): "
                    f"{printable(source)}"
                )
            return fetch(source, where)
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


def _message(message: Mapping[str, Any], where: str, fetch: Fetch | None) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a dict with role and content, found {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if role == "developer":  # OpenAI's later name
        role = "system"
    if role not in ROLES:
        raise ValueError(f"{where}: expected the role {', '.join(ROLES)}, found {printable(role)}")
    of_role = {"assistant": ["tool_calls"], "tool": ["tool_call_id", "name"]}.get(role, [])
    _require_known(message, ("role", "content", *of_role), where)
    calls = tuple(
        _tool_call(call, f"{where}, tool call {i}")
        for i, call in enumerate(_listed(message.get("tool_calls"), f"{where}: tool_calls"))
        if "tool_calls" in of_role
    )
    call_id = message.get("tool_call_id") if role == "tool" else None
    if not isinstance(call_id, str | None):
        raise ValueError(f"{where}: expected tool_call_id as a string, found {type(call_id).__name__}")
    if content is None and calls:
        content = ""
    if isinstance(content, str):
        return Message(role, content, calls, call_id)
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(
            f"{where}: expected content as text or a list of parts, found {type(content).__name__}"
        )
    parts = tuple(read_part(part, f"{where}, part {i}", fetch) for i, part in enumerate(content))
    if role == "tool" and not all(isinstance(part, TextPart) for part in parts):
        raise ValueError(f"{where}: expected text as a tool's result, found a picture")
    return Message(role, parts, calls, call_id)


def _listed(value: Any, where: str) -> Sequence[Any]:
    if value is not None and not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: expected a list, found {type(value).__name__}")
    return value or ()


def _tool_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where}: expected a function with a name, found {printable(call)}")
    _require_known(call, ("id", "type", "function"), where)
    _require_known(function, ("name", "arguments"), where)
    arguments, name = function.get("arguments"), call.get("id")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: arguments: not JSON: {printable(str(error))}") from None
    if not isinstance(arguments, Mapping | None):
        raise ValueError(f"{where}: expected an object as arguments, found {printable(arguments)}")
    checked = json_value(f"{where}: arguments", arguments or {})
    text = json.dumps(checked, ensure_ascii=False)
    return ToolCall(json_value(where, function["name"]), text, name if isinstance(name, str) else "")


def read_part(part: Any, where: str, fetch: Fetch | None = None) -> TextPart | Visual:
    """A part of a message's content. ValueError, naming `where`, for what is none."""
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
        _require_known(part, ("type", *keys, *_SIZES), where)
        source = part[keys[0]]
        if keys[0] == "base64":
            return _image_part(_from_base64(source, where), part, where)
        return _image_part(read_source(source, where, fetch), part, where)
    if kind == "image_url":
        _require_known(part, ("type", "image_url", *_SIZES[:-1]), where)
        link = _link(part, "image_url", ("url", "detail"), where)
        source = read_source(link["url"], where, fetch)
        return _image_part(source, {**part, "detail": link.get("detail")}, where)
    if kind == "video":
        return _video_part(part, where, fetch)
    if kind == "video_url":
        link = _link(part, "video_url", ("url",), where)
        return _video_part({**part, "video_url": None, "video": link["url"]}, where, fetch)
    expected = "text, image, image_url, video or video_url"
    raise ValueError(f"{where}: expected the type {expected}, found {printable(kind)}")


def _link(part: Mapping[str, Any], key: str, known: Sequence[str], where: str) -> Mapping[str, Any]:
    """{"url": address, ...}, for which the address itself may stand."""
    link = part.get(key)
    if not isinstance(link, Mapping):
        link = {"url": link}
    _require_known(link, known, f"{where}, {key}")
    if not isinstance(link.get("url"), str):
        raise ValueError(f"{where}: expected {key} with a url, found {type(link.get('url')).__name__}")
    return link


_IN_MEMORY = (bytes, bytearray, memoryview)
_VIDEO_KEYS = {
    "fps": "fps", "nframes": "nframes", "min_frames": "min_frames", "max_frames": "max_frames",
    "video_start": "start", "video_end": "end", "min_pixels": "min_pixels", "max_pixels": "max_pixels",
    "total_pixels": "total_pixels",
}  # fmt: skip


def _video_part(part: Mapping[str, Any], where: str, fetch: Fetch | None) -> VideoPart:
    video: Any = part.get("video")
    sizes = ("resized_height", "resized_width")
    _require_known(part, ("type", "video", *_VIDEO_KEYS, *sizes), where)
    if isinstance(video, str):
        video = read_source(video, where, fetch)
    elif isinstance(video, (list, tuple)):
        video = [read_source(frame, f"{where}, frame {i}", fetch) for i, frame in enumerate(video)]
    elif not (isinstance(video, (*_IN_MEMORY, os.PathLike, ProcessedImage)) or hasattr(video, "read")):
        found = type(video).__name__
        raise ValueError(f"{where}: expected a clip's path, its bytes or a list of pictures, found {found}")
    bounds = _image_part("", {key: part.get(key) for key in ("min_pixels", "max_pixels", *sizes)}, where)
    given = {name: part[key] for key, name in _VIDEO_KEYS.items() if part.get(key) is not None}
    try:
        return VideoPart(video, VideoOptions(**given, resized=bounds.resized))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _require_known(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """ValueError for another key with a value."""
    for key, value in found.items():
        if key not in known and value is not None:
            hint = f"; {_ELSEWHERE[key]}" if key in _ELSEWHERE else ""
            raise ValueError(f"{where}: unknown key {printable(key)}{hint}")


def _image_part(image: ImageInput, part: Mapping[str, Any], where: str) -> ImagePart:
    least, most, height, width = (
        None if part.get(key) is None else integer(f"{where}: {key}", part[key], 1, MAX_BOUND)
        for key in _SIZES[:-1]
    )
    if (height is None) != (width is None):
        raise ValueError(f"{where}: expected resized_height and resized_width together")
    resized = None if height is None or width is None else (height, width)
    detail = part.get("detail")
    if detail not in (None, "auto", "high", "low"):
        raise ValueError(f"{where}: expected the detail low, high or auto, found {printable(detail)}")
    return ImagePart(image, least, most, resized, detail)


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
