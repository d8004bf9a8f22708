"""What a repository of the hub holds, as the hub says it, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable

_MOST_FILES = 10_000
_MOST_BYTES = 1 << 50  # of one file
_COMMIT = re.compile("[0-9a-f]{40}")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    name: str  # in the repository, with / between folders; safe to write
    size: int  # bytes; 0 where the hub does not say
    sha256: str | None = None  # of large files

    @property
    def base(self) -> str:
        return self.name.rsplit("/", 1)[-1]

    @property
    def folder(self) -> str:
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Listing:
    repository: str
    commit: str
    files: Mapping[str, RemoteFile]  # by name
    architecture: str | None = None  # of its GGUF files, where the hub has looked


def checked_listing(repository: str, info: Any) -> Listing:
    """From what huggingface_hub's `model_info` returns. Files with names that lead out of a folder are left
    out. FormatError for what no hub says."""
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise FormatError(f"{repository}: expected a commit from the hub, found {printable(info.sha)}")
    siblings = info.siblings or ()
    if len(siblings) > _MOST_FILES:
        raise FormatError(f"{repository}: expected at most {_MOST_FILES} files, found {len(siblings)}")
    files = {}
    for sibling in siblings:
        if is_safe(sibling.rfilename):
            files[sibling.rfilename] = _checked_file(repository, sibling)
    gguf = getattr(info, "gguf", None)  # not in old versions of huggingface_hub
    architecture = gguf.get("architecture") if isinstance(gguf, dict) else None
    return Listing(repository, info.sha, files, architecture if isinstance(architecture, str) else None)


def is_safe(name: object) -> bool:
    """Whether a file's name stays inside a folder on every system."""
    return (
        isinstance(name, str)
        and len(name) <= 400
        and name.isprintable()
        and not any(c in name for c in '\\:*?"<>|')
        and all(part.strip(". ") for part in name.split("/"))
    )


def _checked_file(repository: str, sibling: Any) -> RemoteFile:
    lfs = sibling.lfs if isinstance(sibling.lfs, dict) else {}
    size = sibling.size if sibling.size is not None else lfs.get("size", 0)
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= _MOST_BYTES:
        raise FormatError(
            f"{repository}/{sibling.rfilename}: expected its size in bytes, found {printable(size)}"
        )
    sha256 = lfs.get("sha256")
    sound = isinstance(sha256, str) and _SHA256.fullmatch(sha256)
    return RemoteFile(sibling.rfilename, size, sha256 if sound else None)
