"""A server on loopback that answers what huggingface_hub asks of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_LFS_BYTES = 4096  # larger files have a SHA-256 in the listing


@dataclass
class Repository:
    files: dict[str, bytes]
    revisions: tuple[str, ...] = ("main",)
    refusal: tuple[int, str] | None = None  # status and X-Error-Code of every answer
    gguf: dict[str, Any] | None = None  # what the hub says of the GGUF files
    declared: dict[str, Any] = field(default_factory=dict)  # sizes other than the files' own
    cut: dict[str, list[int]] = field(default_factory=dict)  # bytes after which transfers of a file break off
    corrupt: set[str] = field(default_factory=set)  # files that arrive with another byte

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha256(data).digest())
        return digest.hexdigest()

    def listing(self, name: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.files.items():
            size = self.declared.get(path, len(data))
            sibling: dict[str, Any] = {"rfilename": path, "size": size, "blobId": _git_id(data)}
            if len(data) > _LFS_BYTES:
                sibling["lfs"] = {"sha256": _sha256(data), "size": size, "pointerSize": 130}
            siblings.append(sibling)
        gguf = {} if self.gguf is None else {"gguf": self.gguf}
        return {"id": name, "sha": self.commit, "siblings": siblings, **gguf}


class HubServer:
    """Repositories by name; `requests` are (method, path, Range header)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: set[str | None] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def downloads(self) -> list[str]:
        """The files that were asked for, in order."""
        return [
            path.rsplit("/", 1)[1]
            for method, path, _ in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.tokens.add(self.headers.get("Authorization"))
                hub.requests.append((self.command, path, self.headers.get("Range")))
                is_listing = path.startswith("/api/models/")
                owner, base, *rest = path.removeprefix("/api/models").strip("/").split("/")
                repository = hub.repositories.get(f"{owner}/{base}")
                if repository is None:
                    self._refuse(404, "RepoNotFound")
                elif repository.refusal is not None:
                    self._refuse(*repository.refusal)
                elif len(rest) > 1 and rest[1] not in (*repository.revisions, repository.commit):
                    self._refuse(404, "RevisionNotFound")
                elif is_listing:
                    self._send(200, {}, json.dumps(repository.listing(f"{owner}/{base}")).encode(), body)
                elif "/".join(rest[2:]) not in repository.files:
                    self._refuse(404, "EntryNotFound")
                else:
                    self._send_file(repository, "/".join(rest[2:]), body)

            def _send_file(self, repository: Repository, name: str, body: bool) -> None:
                data = repository.files[name]
                etag = _sha256(data) if len(data) > _LFS_BYTES else _git_id(data)
                if name in repository.corrupt:
                    data = bytes([data[0] ^ 1]) + data[1:]
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
                start = 0
                if asked := self.headers.get("Range"):
                    start = int(asked.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                cut = repository.cut.get(name)
                sent = cut.pop(0) if body and cut else None
                self._send(206 if asked else 200, headers, data[start:], body, sent)

            def _refuse(self, status: int, code: str) -> None:
                self._send(status, {"X-Error-Code": code}, b"", body=False)

            def _send(
                self, status: int, headers: dict[str, str], data: bytes, body: bool, sent: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(data[:sent])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
