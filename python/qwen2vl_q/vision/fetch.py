"""Pictures and clips from http(s) addresses: allowed hosts, public addresses, within time and size."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Timer
from time import monotonic
from urllib.parse import SplitResult, urljoin, urlsplit

from qwen2vl_q.base.printable import printable

MAX_URL_CHARS = 8192
_MAX_REDIRECTS = 5
_CHUNK = 2**16
_REDIRECTS = {301, 302, 303, 307, 308}
# What servers call them; "" is what says nothing.
_TYPES = ("image/", "video/", "application/octet-stream", "binary/octet-stream")

Resolve = Callable[[str, int], "Iterable[str]"]


def _addresses(host: str, port: int) -> Iterable[str]:
    return dict.fromkeys(
        str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures and clips.

    hosts: names that may be asked, "*.example.org" for every one below it, "*" for all. An address that is
    private, of this machine or its link, or otherwise not public is refused, whatever its name says, and the
    connection goes to the very address that was checked; allow_private lets them be. Redirects lead to
    allowed hosts alone and are checked alike. max_bytes: of a file. seconds: for all of it.
    """

    hosts: frozenset[str]
    max_bytes: int = 2**26
    seconds: float = 20.0
    allow_private: bool = False
    resolve: Resolve = _addresses

    def fetch(self, url: str, where: str = "image") -> bytes:
        """The file's bytes. ValueError for an address that may not be asked, OSError (TimeoutError, too) for
        what does not come; both name `where` and the host."""
        end = monotonic() + self.seconds
        for _ in range(_MAX_REDIRECTS + 1):
            parts = self._checked(url, where)
            found = self._get(parts, end, where)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise OSError(f"{where}: more than {_MAX_REDIRECTS} redirects")

    def allows(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        return any(
            pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))
            for pattern in self.hosts
        )

    def _checked(self, url: str, where: str) -> SplitResult:
        if len(url) > MAX_URL_CHARS:
            raise ValueError(f"{where}: an address of {len(url)} characters; at most {MAX_URL_CHARS}")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ValueError(f"{where}: expected an http(s) address, found {printable(url)}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise ValueError(f"{where}: expected an http(s) address, found {printable(url)}")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"{where}: an address with a user's name or password")
        if any(not "!" <= c <= "~" for c in parts.netloc + parts.path + parts.query):
            raise ValueError(f"{where}: expected a percent-encoded address, found {printable(url)}")
        if not self.allows(parts.hostname):
            raise ValueError(f"{where}: {printable(parts.hostname)} is not among the hosts that may be asked")
        return parts

    def _get(self, parts: SplitResult, end: float, where: str) -> bytes | str:
        """The body, or where a redirect leads to."""
        assert parts.hostname is not None
        host = printable(parts.hostname)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        address = self._public(parts.hostname, port, where)
        kind = _PinnedSecurely if secure else _Pinned
        connection = kind(parts.hostname, port, timeout=max(0.1, end - monotonic()))
        connection.address = address
        late = Timer(max(0.0, end - monotonic()), connection.cut)
        late.daemon = True
        late.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request(
                "GET", path, headers={"Accept": "image/*, video/*", "Accept-Encoding": "identity"}
            )
            with connection.getresponse() as response:
                if response.status in _REDIRECTS and (target := response.getheader("Location")):
                    return target
                body = self._body(response, host, where)
                if monotonic() >= end:  # an end that was made here
                    raise TimeoutError
                return body
        except (HTTPException, OSError, ssl.SSLError) as error:
            if monotonic() >= end:
                message = f"{where}: {host} has not sent it within {self.seconds:g} s"
                raise TimeoutError(message) from None
            if isinstance(error, _Refused):
                raise
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise OSError(f"{where}: {host}: {printable(text)}") from None
        finally:
            late.cancel()
            connection.close()

    def _public(self, host: str, port: int, where: str) -> str:
        try:
            found = list(self.resolve(host, port))
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise OSError(f"{where}: no address of {printable(host)} is known")
        if not self.allow_private and not all(map(is_public, found)):
            raise ValueError(f"{where}: {printable(host)} has an address that is not public")
        return found[0]

    def _body(self, response: HTTPResponse, host: str, where: str) -> bytes:
        if response.status != 200:
            reason = printable(response.reason)
            raise _Refused(f"{where}: {host} answers {response.status} {reason}")
        kind = (response.getheader("Content-Type") or "").lower()
        if kind and not kind.startswith(_TYPES):
            raise _Refused(f"{where}: expected a picture or a clip from {host}, found {printable(kind)}")
        if (coding := response.getheader("Content-Encoding") or "identity") != "identity":
            raise _Refused(f"{where}: {host} sends {printable(coding)}, unasked")
        body = bytearray()
        expected = response.length
        while chunk := response.read1(_CHUNK) if len(body) <= self.max_bytes else b"":
            body += chunk
        if len(body) > self.max_bytes or (expected or 0) > self.max_bytes:
            raise _Refused(f"{where}: more than {self.max_bytes / 2**20:.0f} MiB from {host}")
        if expected is not None and len(body) < expected:
            raise _Refused(f"{where}: {host} has sent {len(body)} of {expected} bytes")
        return bytes(body)


class _Refused(OSError):
    """Its text is whole."""


class _Pinned(HTTPConnection):
    """To an address that was checked, whatever the name means by now."""

    address = ""
    _socket: socket.socket | None = None  # also while a response has taken it over

    def connect(self) -> None:
        self._socket = self.sock = socket.create_connection((self.address, self.port), self.timeout)

    def cut(self) -> None:
        """From another thread: whoever waits for bytes stops."""
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)


class _PinnedSecurely(_Pinned, HTTPSConnection):
    def connect(self) -> None:
        _Pinned.connect(self)
        context = ssl.create_default_context()
        sock = context.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._socket = self.sock = sock
        sock.do_handshake()


def is_public(address: str) -> bool:
    """Whether anybody's router would send it out. What an IPv6 address wraps counts."""
    try:
        ip = ipaddress.ip_address(address.split("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast
