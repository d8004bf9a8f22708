"""The Hugging Face hub, through huggingface_hub: what it lists, delivers and keeps in its own cache."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qwen2vl_q.base.printable import printable
from qwen2vl_q.hub.listing import Listing, RemoteFile, checked_listing, is_safe

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

_TIMEOUT = 30.0  # seconds for an answer
_CHUNK_BYTES = 1 << 20


class Hub:
    """`folder`: of its cache; None for the one that all programs share (HF_HOME, HF_HUB_CACHE)."""

    def __init__(self, folder: Path | None = None, token: str | None = None):
        from huggingface_hub import HfApi, constants

        self.folder = Path(folder or constants.HF_HUB_CACHE)
        self._api = HfApi(token=token)

    def listing(self, repository: str, revision: str | None) -> Listing:
        """Raises OSError: FileNotFoundError, PermissionError, ConnectionError with what to do."""
        with _explained(repository, revision):
            info = self._api.model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        return checked_listing(repository, info)

    def cached_listing(self, repository: str, revision: str | None) -> Listing | None:
        """Of the files that the cache has: of the revision, or of the latest that was fetched."""
        info = self._scan()
        found = [
            cached
            for repo in (info.repos if info else ())
            if (repo.repo_type, repo.repo_id) == ("model", repository)
            for cached in repo.revisions
            if revision is None or revision in cached.refs or revision == cached.commit_hash
        ]
        if not found:
            return None
        latest = max(found, key=lambda cached: ("main" in cached.refs, cached.last_modified))
        files = {}
        for file in latest.files:
            name = file.file_path.relative_to(latest.snapshot_path).as_posix()
            if is_safe(name):
                files[name] = RemoteFile(name, file.size_on_disk)
        return Listing(repository, latest.commit_hash, files)

    def cached(self, listing: Listing, file: RemoteFile) -> Path | None:
        """Where the cache has the file, in the size that the hub says."""
        path = self._path(listing, file)
        return path if path and (not file.size or path.stat().st_size == file.size) else None

    def fetch(self, listing: Listing, file: RemoteFile) -> Path:
        """The file in the cache, fetched where it is not there. Errors as of `listing`; OSError where what
        arrives is not what the hub has promised."""
        if path := self.cached(listing, file):
            return path
        with _explained(listing.repository, listing.commit):
            path = Path(
                self._api.hf_hub_download(
                    listing.repository,
                    file.name,
                    revision=listing.commit,
                    cache_dir=self.folder,
                    force_download=self._path(listing, file) is not None,  # in another size
                )
            )
        _check(f"{listing.repository}/{file.name}", file, path)
        return path

    def delete(self, repository: str, commit: str, names: Collection[str]) -> None:
        """Files of one revision, by huggingface_hub's own deletion; the revision where nothing is left."""
        from huggingface_hub import DeleteCacheStrategy

        info = self._scan()
        repos = [r for r in info.repos if (r.repo_type, r.repo_id) == ("model", repository)] if info else []
        for repo in repos:
            for revision in (r for r in repo.revisions if r.commit_hash == commit):
                by_name = {
                    f.file_path.relative_to(revision.snapshot_path).as_posix(): f for f in revision.files
                }
                going = [file for name, file in by_name.items() if name in names]
                if len(going) == len(by_name) and info:
                    info.delete_revisions(commit).execute()
                    continue
                kept = {f.blob_path for r in repo.revisions for f in r.files if f not in going}
                DeleteCacheStrategy(
                    expected_freed_size=sum(file.size_on_disk for file in going),
                    blobs=frozenset(file.blob_path for file in going) - kept,
                    refs=frozenset(),
                    repos=frozenset(),
                    snapshots=frozenset(file.file_path for file in going),
                ).execute()

    def _path(self, listing: Listing, file: RemoteFile) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            listing.repository, file.name, cache_dir=self.folder, revision=listing.commit
        )
        return Path(found) if isinstance(found, str) else None

    def _scan(self) -> HFCacheInfo | None:
        from huggingface_hub import CacheNotFound, scan_cache_dir

        try:
            return scan_cache_dir(self.folder)
        except (CacheNotFound, ValueError):
            return None


def _check(name: str, file: RemoteFile, path: Path) -> None:
    """Removes a file whose size or hash is not the promised one."""
    size = path.stat().st_size
    if file.size and size != file.size:
        difference = f"expected {file.size} bytes, found {size}"
    elif file.sha256 and (found := _sha256(path)) != file.sha256:
        difference = f"expected SHA-256 {file.sha256}, found {found}"
    else:
        return
    path.resolve().unlink()  # the cache's snapshots are links
    path.unlink(missing_ok=True)
    raise OSError(f"{printable(name, 400)}: {difference}: what came is damaged, and removed; try again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _explained(repository: str, revision: str | None) -> Iterator[None]:
    """Errors of huggingface_hub as OSError, in a line that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, then log in "
            "(hf auth login) or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision '{printable(revision)}'") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is no file here, and the Hugging Face hub has no such repository; a private one "
            "needs a login (hf auth login) or HF_TOKEN"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ConnectionError(f"{repository}: HF_HUB_OFFLINE forbids to ask the hub") from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"{repository}: the hub refuses this login: {_first_line(error)}; see hf auth login, HF_TOKEN"
            ) from error
        raise OSError(f"{repository}: the hub does not deliver: {_first_line(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repository, error.__cause__ or error) from error
    except _transport_error() as error:
        raise _unreachable(repository, error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's
        raise OSError(f"{repository}: the hub does not deliver: {_first_line(error)}") from error


def _transport_error() -> type[Exception]:
    """The root of the errors of the HTTP library that this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    ancestors = HfHubHTTPError.__mro__
    return cast(type[Exception], ancestors[ancestors.index(OSError) - 1])


def _unreachable(repository: str, error: BaseException) -> ConnectionError:
    return ConnectionError(f"{repository}: the Hugging Face hub cannot be reached: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0] if lines else type(error).__name__, 300)
