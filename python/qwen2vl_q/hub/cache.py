"""What has been fetched and made by name: a record for each model, and the files that were converted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen2vl_q.base.atomic_file import whole_or_not_at_all
from qwen2vl_q.base.file_lock import try_lock
from qwen2vl_q.hub.choice import names_of
from qwen2vl_q.hub.listing import is_safe
from qwen2vl_q.hub.names import HubName

_VARIABLE = "QWEN2VL_CACHE"
_MOST_RECORD_BYTES = 1 << 20
_PATIENCE = 0.2  # seconds between looks at another process's lock


@dataclass(frozen=True)
class Entry:
    """A model that is there. Paths are absolute."""

    repository: str
    type: str
    revision: str | None  # as asked for
    commit: str
    default: bool  # what the name stands for without a type
    made: bool  # converted here, from the downloads
    model: str
    mmproj: str | None
    snapshot: str  # the hub's cache has the downloads in this folder
    downloads: tuple[str, ...]  # names in it

    @property
    def name(self) -> HubName:
        return HubName(self.repository, self.type, self.revision)

    @property
    def download_paths(self) -> list[Path]:
        return [Path(self.snapshot, name) for name in self.downloads]

    @property
    def paths(self) -> list[Path]:
        """Every file that the model is read from."""
        if self.made:
            return [Path(self.model)]
        return [path for path in self.download_paths if path.suffix.lower() == ".gguf"]

    @property
    def size(self) -> int:
        """Bytes of `paths`."""
        return sum(path.stat().st_size for path in self.paths)

    def exists(self) -> bool:
        return all(path.is_file() for path in self.paths)

    def answers(self, name: HubName) -> bool:
        """Whether it is what `name` stands for."""
        if (name.repository, name.revision) != (self.repository, self.revision):
            return False
        return self.default if name.type is None else name.type.lower() in self._names()

    def is_of(self, name: HubName) -> bool:
        """Whether `name` covers it: without a type or a revision, all of them."""
        return (
            name.repository == self.repository
            and name.revision in (None, self.revision)
            and (name.type is None or name.type.lower() in self._names())
        )

    def _names(self) -> set[str]:
        return names_of(self.type, Path(self.model).name)


class Cache:
    """A folder with `models/OWNER--NAME/`: records, and converted files by commit; and `locks/`."""

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self.folder = Path(folder or default_folder()).expanduser().absolute()

    def model_folder(self, repository: str) -> Path:
        return self.folder / "models" / repository.replace("/", "--")

    def converted_path(self, repository: str, commit: str, type: str) -> Path:
        base = repository.rsplit("/", 1)[1]
        return self.model_folder(repository) / commit[:12] / f"{base}-{type}.gguf"

    def entries(self) -> list[Entry]:
        """Of models whose files are all there, by name. What is no record is passed over."""
        found = (_read(path) for path in sorted(self.folder.glob("models/*/*.json")))
        whole = [entry for entry in found if entry is not None and entry.exists()]
        return sorted(whole, key=lambda entry: str(entry.name).lower())

    def find(self, name: HubName) -> Entry | None:
        """What `name` stands for; it counts as used now."""
        for path in self.model_folder(name.repository).glob("*.json"):
            entry = _read(path)
            if entry is not None and entry.answers(name) and entry.exists():
                with contextlib.suppress(OSError):  # a cache that only others may write
                    os.utime(path)
                return entry
        return None

    def last_used(self, entry: Entry) -> float:
        """Seconds since 1970."""
        return self._record(entry).stat().st_mtime

    def save(self, entry: Entry) -> None:
        """In place of an older one of its name, whose converted file goes; it alone is the default."""
        for other in self.entries():
            if (other.repository, other.revision) != (entry.repository, entry.revision):
                continue
            if other.type == entry.type:
                entry = replace(entry, default=entry.default or other.default)
                if other.made and other.model != entry.model:
                    self._unlink(Path(other.model))
            elif other.default and entry.default:
                self._write(replace(other, default=False))
        self._write(entry)

    def remove(self, entry: Entry) -> None:
        """The record, and the converted file unless another record has it too."""
        self._record(entry).unlink(missing_ok=True)
        if entry.made and not any(entry.model == other.model for other in self.entries()):
            self._unlink(Path(entry.model))
        with contextlib.suppress(OSError):  # not empty
            self.model_folder(entry.repository).rmdir()

    @contextlib.contextmanager
    def lock(self, repository: str, tell: Callable[[str], None]) -> Iterator[None]:
        """One process at a time works on a repository; the others wait."""
        path = self.folder / "locks" / f"{repository.replace('/', '--')}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if not try_lock(file):
                tell(f"{repository}: waiting for another process that fetches or converts it")
                while not try_lock(file):
                    time.sleep(_PATIENCE)
            yield

    def _record(self, entry: Entry) -> Path:
        key = hashlib.sha256(f"{entry.type}@{entry.revision or ''}".encode()).hexdigest()
        return self.model_folder(entry.repository) / f"{key[:16]}.json"

    def _write(self, entry: Entry) -> None:
        path = self._record(entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_or_not_at_all(path, overwrite=True) as part:
            part.write_text(json.dumps(asdict(entry), indent=2) + "\n", encoding="utf-8")

    def _unlink(self, path: Path) -> None:
        """Only inside this cache, whatever a record says."""
        if self.folder.resolve() in path.resolve().parents:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


def default_folder() -> Path:
    """QWEN2VL_CACHE, else the platform's folder for caches."""
    if given := os.environ.get(_VARIABLE):
        return Path(given)
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qwen2vl-q" / "Cache"
        )
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qwen2vl-q"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2vl-q"


def _read(path: Path) -> Entry | None:
    """None for what is no record of this cache."""
    try:
        if path.stat().st_size > _MOST_RECORD_BYTES:
            return None
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        values = {field.name: value[field.name] for field in fields(Entry)}
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    texts = ("repository", "type", "commit", "model", "snapshot")
    sound = (
        all(isinstance(values[name], str) for name in texts)
        and all(isinstance(values[name], (str, type(None))) for name in ("revision", "mmproj"))
        and all(isinstance(values[name], bool) for name in ("default", "made"))
        and isinstance(values["downloads"], list)
        and all(isinstance(name, str) for name in values["downloads"])
    )
    if not sound:
        return None
    entry = Entry(**{**values, "downloads": tuple(values["downloads"])})
    # What is removed is named by these.
    of_hub = Path(entry.snapshot).parts[-2:] == ("snapshots", entry.commit) and all(
        map(is_safe, entry.downloads)
    )
    return entry if of_hub else None
