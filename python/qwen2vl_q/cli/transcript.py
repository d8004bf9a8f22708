"""Conversations as files: messages as JSON, or Markdown to read."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from qwen2vl_q.base.atomic_file import whole_or_not_at_all
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.chat.messages import ImagePart, Message, VideoPart, Visual, normalize

_MAX_BYTES = 256 * 1024 * 1024  # room for a few pictures as data: URIs


def write(path: Path, messages: Iterable[Mapping[str, Any]], sources: Mapping[bytes, Visual]) -> None:
    """As messages to FILE.json, as Markdown to FILE.md. `sources`: a picture's key -> what it was made of.

    ValueError for another name or a folder that is not there, OSError where the file cannot be written.
    """
    described = [{**message, "content": _described(message["content"], sources)} for message in messages]
    match path.suffix.lower():
        case ".json":
            text = json.dumps(described, ensure_ascii=False, indent=2) + "\n"
        case ".md":
            text = "\n".join(f"## {m['role']}\n\n{_markdown(m['content'])}\n" for m in described)
        case _:
            raise ValueError(f"{path}: expected a name that ends in .json or .md")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"there is no folder '{path.absolute().parent}'")
    with whole_or_not_at_all(path, overwrite=True) as part:
        # A name that is not UTF-8 has halves of surrogate pairs: \udcff is what JSON writes for them.
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def read(path: Path) -> list[Message]:
    """A conversation that a question can follow; relative paths of pictures are of the file's folder.

    OSError where the file cannot be read, FormatError for one that holds something else.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise FormatError(f"{path}: expected a conversation of {_MAX_BYTES // 2**20} MiB at most")
    try:
        messages = normalize(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not a conversation: {error}") from None
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise FormatError(
            f"{path}: not a conversation: expected user and assistant in turns, found {', '.join(roles[:8])}"
        )
    if roles[0] == "system" and not isinstance(messages[0].content, str):
        raise FormatError(f"{path}: message 0: expected the system prompt as a string")
    if any(message.tool_calls for message in messages):
        raise FormatError(f"{path}: a conversation with tools")
    return [_in_folder(message, path.absolute().parent) for message in messages]


def _in_folder(message: Message, folder: Path) -> Message:
    def resolved(part: Any) -> Any:
        if isinstance(part, ImagePart) and isinstance(part.image, (str, PathLike)):
            return replace(part, image=str(folder / part.image))
        if isinstance(part, VideoPart):
            files = part.video
            return replace(part, video=[*map(inside, files)] if isinstance(files, list) else inside(files))
        return part

    def inside(file: Any) -> Any:
        return str(folder / file) if isinstance(file, (str, PathLike)) else file

    if isinstance(message.content, str):
        return message
    return replace(message, content=tuple(map(resolved, message.content)))


def _described(content: Any, sources: Mapping[bytes, Visual]) -> Any:
    if isinstance(content, str):
        return content
    return [
        part if part["type"] == "text" else _part(sources[part[part["type"]].key], part["type"])
        for part in content
    ]


def _part(source: Visual, kind: str) -> dict[str, Any]:
    """kind: image or video."""
    message = source.for_message()
    file = message[kind]
    return {**message, kind: [*map(_named, file)] if isinstance(file, list) else _named(file)}


def _named(file: Any) -> str:
    return f"data:;base64,{base64.b64encode(file).decode()}" if isinstance(file, bytes) else fspath(file)


def _markdown(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(
        part["text"] if part["type"] == "text" else _links(part[part["type"]]) for part in content
    )


def _links(files: str | list[str]) -> str:
    return " ".join(map(_link, files)) if isinstance(files, list) else _link(files)


def _link(file: str) -> str:
    return f"![]({file if file.startswith('data:') else Path(file).as_uri()})"
