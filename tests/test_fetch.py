"""Pictures from addresses: which hosts may be asked, and what of servers that mean harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest

from qwen2vl_q.vision.fetch import Fetcher, is_public

PICTURE = b"\x89PNG picture"
HOST = "pictures.example"


class Server(ThreadingHTTPServer):
    """Answers each path as a server of its kind does."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str]] = []
        self.over = Event()

    def url(self, path: str, host: str = HOST) -> str:
        return f"http://{host}:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        path, _, argument = self.path.partition("?")
        match path:
            case "/a.png":
                self._answer(200, PICTURE, Content_Type="image/png", Content_Length=str(len(PICTURE)))
            case "/plain":
                self._answer(200, PICTURE)
            case "/to":
                self._answer(302, Location=argument)
            case "/page":
                self._answer(200, b"<html>", Content_Type="text/html; charset=utf-8")
            case "/zipped":
                self._answer(200, PICTURE, Content_Type="image/png", Content_Encoding="gzip")
            case "/claims":
                self._answer(200, PICTURE, Content_Type="image/png", Content_Length=str(10**12))
            case "/endless":
                self._answer(200, Content_Type="image/png")
                while not self.server.over.is_set():
                    self.wfile.write(bytes(4096))
            case "/slow":
                self._answer(200, Content_Type="image/png")
                while not self.server.over.wait(0.05):
                    self.wfile.write(b"x")
            case "/slow-head":
                while not self.server.over.wait(0.05):
                    self.wfile.write(b"H")
            case "/short":
                self._answer(200, PICTURE, Content_Type="image/png", Content_Length="1000")
            case _:
                self._answer(404, b"no")


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients go away
    Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def fetcher(**options: Any) -> Fetcher:
    defaults: dict[str, Any] = {
        "hosts": frozenset({HOST}),
        "allow_private": True,
        "resolve": lambda host, port: ["127.0.0.1"],
        "max_bytes": 10**6,
    }
    return Fetcher(**{**defaults, **options})


@pytest.mark.parametrize("path", ["/a.png", "/plain", "/to?/a.png", "/to?/to?/a.png"])
def test_a_picture_comes(server: Server, path: str) -> None:
    assert fetcher().fetch(server.url(path)) == PICTURE
    assert {host for host, _ in server.asked} == {f"{HOST}:{server.server_port}"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "image 3: pictures.example answers 404 Not Found"),
        (
            "/page",
            "image 3: expected a picture or a clip from pictures.example, found text/html; charset=utf-8",
        ),
        ("/zipped", "image 3: pictures.example sends gzip, unasked"),
        ("/claims", "image 3: more than 1 MiB from pictures.example"),
        ("/endless", "image 3: more than 1 MiB from pictures.example"),
        ("/short", "image 3: pictures.example has sent 12 of 1000 bytes"),
        ("/to?" * 6 + "/a.png", "image 3: more than 5 redirects"),
    ],
)
def test_what_servers_send_instead(server: Server, path: str, message: str) -> None:
    with pytest.raises(OSError) as error:
        fetcher().fetch(server.url(path), "image 3")
    assert str(error.value) == message


@pytest.mark.parametrize("path", ["/slow", "/slow-head"])
def test_time_ends(server: Server, path: str) -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"image: pictures\.example has not sent it within 0\.5 s"):
        fetcher(seconds=0.5).fetch(server.url(path))
    assert time.monotonic() - begun < 60  # it never ends otherwise


@pytest.mark.parametrize(
    ("hosts", "host", "allowed"),
    [
        ({"a.example"}, "A.example.", True),
        ({"a.example"}, "b.a.example", False),
        ({"*.a.example"}, "b.a.example", True),
        ({"*.a.example"}, "a.example", False),
        ({"*.a.example"}, "ba.example", False),
        ({"*"}, "anything", True),
        (set(), "a.example", False),
    ],
)
def test_hosts(hosts: set[str], host: str, allowed: bool) -> None:
    assert Fetcher(frozenset(hosts)).allows(host) is allowed


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://pictures.example/a", "expected an http\\(s\\) address"),
        ("http://", "expected an http\\(s\\) address"),
        ("http://pictures.example:0/", "expected an http\\(s\\) address"),
        ("http://pictures.example:port/", "expected an http\\(s\\) address"),
        ("http://[::1/", "expected an http\\(s\\) address"),
        ("http://user@pictures.example/", "a user's name or password"),
        ("http://pictures.example/a\r\nX: y", "percent-encoded|expected an http"),
        ("http://pictures.example/ä", "percent-encoded"),
        ("http://elsewhere.example/a.png", "elsewhere.example.* is not among the hosts"),
        ("http://pictures.example/" + "a" * 9000, "an address of 9024 characters"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("nothing may be asked")

    with pytest.raises(ValueError, match=message):
        fetcher(resolve=resolve).fetch(url)


def test_private_addresses_are_refused(server: Server) -> None:
    """Also behind a redirect, and where one of several is public."""
    for found in (["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["not an address"]):
        with pytest.raises(ValueError, match="has an address that is not public"):
            fetcher(allow_private=False, resolve=lambda *_, found=found: found).fetch(server.url("/a.png"))
    assert server.asked == []
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.* is not among the hosts"):
        fetcher().fetch(server.url(f"/to?http://127.0.0.1:{server.server_port}/a.png"))
    assert len(server.asked) == 1


def test_the_address_that_was_checked_is_asked(server: Server) -> None:
    """A name that means something else a moment later does not matter."""
    answers = iter([["127.0.0.1"]])
    assert fetcher(resolve=lambda *_: next(answers)).fetch(server.url("/a.png")) == PICTURE


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("no address", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_nobody_answers() -> None:
    with pytest.raises(OSError, match=r"image: no address of nowhere\.example is known"):
        fetcher(hosts=frozenset({"*"}), resolve=lambda *_: []).fetch("http://nowhere.example/a")
    with pytest.raises(OSError, match=r"image: pictures\.example: .*refused"):
        fetcher().fetch("http://pictures.example:1/a.png")
