"""Models by name: those of a cache, else the hub's, fetched or converted into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.hub.cache import Cache, Entry
from qwen2vl_q.hub.choice import (
    Variant,
    checkpoint_files,
    checkpoint_weights,
    choose,
    listed,
    names_of,
    variants,
)
from qwen2vl_q.hub.disk import require_room, size_text
from qwen2vl_q.hub.listing import Listing, RemoteFile
from qwen2vl_q.hub.names import HubName

if TYPE_CHECKING:
    from qwen2vl_q.hub.client import Hub

Progress = Callable[[str, int, int], None]  # "convert", bytes done, bytes in all

_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 1 << 20
_MOST_TEXT_BYTES = 1 << 28  # the converter's own bound
_ARCHITECTURES = (None, "qwen2vl", "clip")  # as GGUF files say it: the language model, the vision tower


class Models:
    """`cache_dir`: for everything that is fetched and made; None for QWEN2VL_CACHE or the platform's folder,
    with downloads in the hub's own cache. `token`: the hub's, None for the one that is logged in. `tell` is
    given a line about what takes long, `progress` a conversion's."""

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | None = None,
        tell: Callable[[str], None] = lambda line: None,
        progress: Progress | None = None,
    ):
        self.cache = Cache(cache_dir)
        self._downloads = None if cache_dir is None else self.cache.folder / "hub"
        self._token = token
        self._tell = tell
        self._progress = progress

    def get(self, name: HubName, local_files_only: bool = False) -> Entry:
        """Without the network where the cache has it. Raises OSError for what the hub, the network or the
        disk refuses, Qwen2VLError for a repository that holds something else, ValueError for a name with
        several meanings."""
        if entry := self.cache.find(name):
            return entry
        with self.cache.lock(name.repository, self._tell):
            if entry := self.cache.find(name):  # another process's, just now
                return entry
            hub = self._hub()
            return self._obtain(hub, self._known_listing(hub, name, local_files_only), name)

    def pull(self, name: HubName) -> Entry:
        """As the hub has it now; an older version's downloads stay. Errors as of `get`."""
        with self.cache.lock(name.repository, self._tell):
            hub, before = self._hub(), self.cache.find(name)
            entry = self._obtain(hub, hub.listing(name.repository, name.revision), name)
        if before is not None and before.commit != entry.commit:
            self._tell(f"{name}: the version before, {before.commit}, is still in the hub's cache")
        return entry

    def checkpoint(self, name: HubName) -> Path:
        """A checkpoint's folder in the hub's cache: the hub's version where it can be reached. Errors as of
        `get`."""
        with self.cache.lock(name.repository, self._tell):
            hub = self._hub()
            listing = self._known_listing(hub, name, local_files_only=False)
            _require_checkpoint(listing)
            self._require_qwen2vl(hub, listing)
            return self._fetched_checkpoint(hub, listing)

    def files_of(self, entries: Sequence[Entry]) -> dict[Path, int]:
        """What `remove` takes away, with sizes in bytes."""
        left = [other for other in self.cache.entries() if other not in entries]
        kept = {path for other in left for path in other.paths}
        paths = [path for entry in entries for path in (*entry.paths, *entry.download_paths)]
        return {path: path.stat().st_size for path in paths if path not in kept and path.is_file()}

    def remove(self, entries: Sequence[Entry]) -> None:
        """With their downloads, but for files that another model of the cache is read from."""
        from qwen2vl_q.hub.client import Hub

        going = self.files_of(entries)
        for entry in entries:
            with self.cache.lock(entry.repository, self._tell):
                names = [name for name in entry.downloads if Path(entry.snapshot, name) in going]
                Hub(Path(entry.snapshot).parents[2]).delete(entry.repository, entry.commit, names)
                self.cache.remove(entry)

    def _hub(self) -> Hub:
        from qwen2vl_q.hub.client import Hub

        return Hub(self._downloads, self._token)

    def _known_listing(self, hub: Hub, name: HubName, local_files_only: bool) -> Listing:
        """The hub's; where it cannot be reached, what its cache has."""
        refusal = ConnectionError(f"{name.repository}: local_files_only forbids to ask the hub")
        if not local_files_only:
            try:
                return hub.listing(name.repository, name.revision)
            except ConnectionError as error:
                refusal = error
        if cached := hub.cached_listing(name.repository, name.revision):
            return cached
        raise ConnectionError(f"{refusal}; the cache does not have it") from refusal

    def _obtain(self, hub: Hub, listing: Listing, name: HubName) -> Entry:
        offered, weights = variants(listing), checkpoint_weights(listing)
        if not offered:
            _require_checkpoint(listing)
        self._require_qwen2vl(hub, listing)
        has_it = name.type is None or any(
            name.type.lower() in names_of(variant.type, variant.parts[0].base) for variant in offered
        )
        if offered and (has_it or not weights):
            entry = self._fetched(hub, listing, choose(name.repository, offered, name.type), name)
        else:
            entry = self._converted(hub, listing, offered, name)
        self.cache.save(entry)
        return entry

    def _require_qwen2vl(self, hub: Hub, listing: Listing) -> None:
        """Before anything large is fetched."""
        from qwen2vl_q.hub.conversion import require_qwen2vl

        if listing.architecture not in _ARCHITECTURES:
            raise UnsupportedError(f"{listing.repository} is {printable(listing.architecture)}, not Qwen2-VL")
        if config := listing.files.get(_CONFIG):
            _require_size(listing, config, _MOST_CONFIG_BYTES)
            require_qwen2vl(listing.repository, hub.fetch(listing, config))

    def _fetched(self, hub: Hub, listing: Listing, variant: Variant, name: HubName) -> Entry:
        files = [*variant.parts, *([variant.tower] if variant.tower else [])]
        missing = _missing(hub, listing, files)
        require_room(name.repository, [(hub.folder, _size(missing))])
        self._tell_of(hub, f"{name.repository}, {variant.type}", missing)
        paths = [hub.fetch(listing, file) for file in files]
        entry = self._entry(listing, name, variant.type, str(paths[0]), files, paths[0])
        return replace(entry, mmproj=str(paths[-1])) if variant.tower else entry

    def _converted(
        self,
        hub: Hub,
        listing: Listing,
        offered: Sequence[Variant],
        name: HubName,
    ) -> Entry:
        from qwen2vl_q.hub import conversion

        config = hub.fetch(listing, listing.files[_CONFIG])
        type = name.type.upper() if name.type else conversion.default_type(config)
        if type not in conversion.TYPES:
            has = f"it has {listed(offered)}, " if offered else ""
            types = ", ".join(conversion.TYPES)
            raise FileNotFoundError(
                f"{name.repository} has no {printable(name.type)}; {has}its checkpoint converts to {types}"
            )
        out = self.cache.converted_path(listing.repository, listing.commit, type)
        files = checkpoint_files(listing)
        if not out.exists():
            n_bytes = conversion.rough_size(_size(checkpoint_weights(listing)), type)
            folder = self._fetched_checkpoint(hub, listing, [(self.cache.folder, n_bytes)])
            self._tell(f"{name.repository}: converting to {type}, once: {out}")
            for note in conversion.convert(folder, out, type, name.title, self._converting()):
                self._tell(f"note: {note}")
        first = hub.fetch(listing, files[0])
        return replace(self._entry(listing, name, type, str(out), files, first), made=True)

    def _fetched_checkpoint(self, hub: Hub, listing: Listing, needs: Sequence[tuple[Path, int]] = ()) -> Path:
        """Its folder. `needs`: what else has to have room, as of `require_room`."""
        from qwen2vl_q.hub.conversion import require_checkpoint

        files = checkpoint_files(listing)
        for file in files:
            if not file.name.endswith(".safetensors"):
                _require_size(listing, file, _MOST_TEXT_BYTES)
        config = hub.fetch(listing, listing.files[_CONFIG])
        require_checkpoint(config)
        missing = _missing(hub, listing, files)
        require_room(listing.repository, [(hub.folder, _size(missing)), *needs])
        self._tell_of(hub, f"{listing.repository}, a checkpoint", missing)
        for file in files:
            hub.fetch(listing, file)
        return config.parent

    def _converting(self) -> Callable[[int, int], None] | None:
        progress = self._progress
        return None if progress is None else lambda done, total: progress("convert", done, total)

    def _entry(
        self,
        listing: Listing,
        name: HubName,
        type: str,
        model: str,
        files: Sequence[RemoteFile],
        first: Path,  # of the files
    ) -> Entry:
        return Entry(
            repository=name.repository,
            type=type,
            revision=name.revision,
            commit=listing.commit,
            default=name.type is None,
            made=False,
            model=model,
            mmproj=None,
            snapshot=str(first.parents[files[0].name.count("/")]),
            downloads=tuple(file.name for file in files),
        )

    def _tell_of(self, hub: Hub, what: str, missing: Sequence[RemoteFile]) -> None:
        if missing:
            noun = "file" if len(missing) == 1 else "files"
            self._tell(
                f"{what}: fetching {len(missing)} {noun}, {size_text(_size(missing))}, from the Hugging "
                f"Face hub into {hub.folder}"
            )


def _require_checkpoint(listing: Listing) -> None:
    """UnsupportedError where there is none."""
    if not checkpoint_weights(listing):
        has_gguf = any(name.lower().endswith(".gguf") for name in listing.files)
        what = "GGUF files and no" if has_gguf else "neither GGUF files nor a"
        raise UnsupportedError(f"{listing.repository} holds {what} checkpoint in safetensors")
    if _CONFIG not in listing.files:
        what = "an adapter" if "adapter_config.json" in listing.files else "no config.json"
        raise UnsupportedError(f"{listing.repository} holds {what}, not a Qwen2-VL checkpoint")


def _missing(hub: Hub, listing: Listing, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    return [file for file in files if hub.cached(listing, file) is None]


def _size(files: Iterable[RemoteFile]) -> int:
    return sum(file.size for file in files)


def _require_size(listing: Listing, file: RemoteFile, limit: int) -> None:
    if file.size > limit:
        raise FormatError(
            f"{listing.repository}/{file.name}: expected at most {limit} bytes, found {file.size}"
        )
