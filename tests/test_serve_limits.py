"""Who may ask the server, for how much, and what it does with the rest."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

import pytest
from PIL import Image

from command_line import Run
from qwen2vl_q import Qwen2VL
from qwen2vl_q.serve.limits import Limits
from qwen2vl_q.vision.fetch import Fetcher
from serving import Serving, about, card, data_uri, png, serving

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
SMALL = Limits(
    body_bytes=2**20,
    images=2,
    pixels=10**6,
    visual_tokens=400,
    prompt_tokens=600,
    output_tokens=64,
    answers=2,
    queued=1,
    queue_bytes=3 * 2**20,
    seconds=20.0,
)


@pytest.fixture(scope="module")
def small() -> Iterator[Serving]:
    with serving(limits=SMALL) as found:
        yield found


def error_of(answer: Any) -> str:
    message: str = answer["error"]["message"]
    return message


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says so."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def with_parts(*parts: Any) -> dict[str, Any]:
    return {**HELLO, "messages": [{"role": "user", "content": list(parts)}]}


def image_part(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image", "base64": base64.b64encode(data).decode(), **more}


def test_limits_of_a_request(small: Serving) -> None:
    tile = image_part(png(Image.new("RGB", (56, 56))))
    cases: list[tuple[Any, int, str]] = [
        (b'{"messages": "' + b"x" * 2**20 + b'"}', 413, "at most 1048576 bytes"),
        (with_parts(tile, tile, tile), 400, "at most 2 pictures, found 3"),
        (with_parts(image_part(claims(12000, 12000))), 400, "at most 1000000 pixels, found 12000 x 12000"),
        (with_parts(image_part(png(Image.new("RGB", (700, 700))))), 400, "takes 625 tokens"),
        (with_parts(image_part(b"not a picture")), 400, "not an image"),
        ({**HELLO, "max_tokens": 65}, 400, "max_tokens: expected at most 64"),
        ({**HELLO, "messages": [{"role": "user", "content": "word " * 700}]}, 400, "at most 600 tokens"),
        ({**HELLO, "n": 3}, 400, "n: expected at most 2 answers"),
        (b"{", 400, "expected JSON"),
        (b"[" * 10**5, 400, "too deep"),
        (b'{"temperature": NaN}', 400, "NaN is no JSON"),
        (b"[]", 400, "expected a JSON object, found list"),
        (b"\xff\xfe", 400, "expected JSON"),
    ]
    for body, status, message in cases:
        found, answer = small.ask(CHAT, body)
        assert (found, message in error_of(answer)) == (status, True), answer
    assert small.ask(CHAT, HELLO)[0] == 200


def test_an_error_names_a_field_or_none(small: Serving) -> None:
    wide = image_part(png(Image.new("L", (300, 1))))
    cases: list[tuple[str, Any, str | None]] = [
        (CHAT, {**HELLO, "temperature": -1}, "temperature"),
        (CHAT, {**HELLO, "messages": [{"role": "nobody", "content": "a"}]}, "messages"),
        (CHAT, with_parts(wide), None),
        (CHAT, {**HELLO, "messages": [{"role": "user", "content": "x" * 100_000}]}, None),
        ("/v1/completions", {"prompt": [-1]}, "prompt"),
    ]
    for path, body, field in cases:
        status, answer = small.ask(path, body)
        assert (status, answer["error"]["param"]) == (400, field), answer


def test_no_text_is_tokenized_that_no_prompt_could_hold(small: Serving) -> None:
    """Megabytes of one would hold everybody up. Nor are more tokens made text."""
    status, answer = small.ask("/tokenize", {"prompt": "x" * 100_000})
    assert (status, "more than the 600 tokens" in error_of(answer)) == (400, True), answer
    status, answer = small.ask("/detokenize", {"tokens": [5] * 601})
    assert (status, error_of(answer)) == (400, "tokens: expected at most 600, found 601"), answer
    assert small.ask("/tokenize", {"prompt": "x" * 2000})[0] == 200
    assert small.ask("/detokenize", {"tokens": [5] * 600})[0] == 200


def test_never_a_file_of_this_machine(small: Serving, tmp_path: Path) -> None:
    file = tmp_path / "card.png"
    file.write_bytes(png(card(0)[0]))
    for part in (
        {"type": "image_url", "image_url": {"url": str(file)}},
        {"type": "image_url", "image_url": {"url": f"file://{file}"}},
        {"type": "image", "image": str(file)},
        {"type": "image", "url": f"FILE://{file}"},
        {"type": "image", "path": str(file)},
        {"type": "image", "image": ["x"]},
        {"type": "image_url", "image_url": "http://127.0.0.1/card.png"},
    ):
        status, answer = small.ask(CHAT, with_parts(part))
        assert status == 400, answer
        assert answer["error"]["param"] == "messages"


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = png(card(0)[0])
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


def test_pictures_of_allowed_hosts() -> None:
    pictures = ThreadingHTTPServer(("127.0.0.1", 0), _Pictures)
    thread = threading.Thread(target=pictures.serve_forever)
    thread.start()
    fetcher = Fetcher(
        frozenset({"cards.example"}), allow_private=True, resolve=lambda host, port: ["127.0.0.1"]
    )
    try:
        with serving(fetcher=fetcher) as served:
            talk = about(card(0)[0])
            at = f"http://cards.example:{pictures.server_port}/card.png"
            for url in ({"url": at}, {"url": at, "detail": "low"}):
                talk[0]["content"][0]["image_url"] = url
                answer = served.client.chat.completions.create(model="demo", messages=talk, temperature=0)
                assert answer.choices[0].message.content == card(0)[1]
            status, refused = served.ask(CHAT, with_parts({"type": "image", "url": "http://other.example/a"}))
            assert (status, "not among the hosts" in error_of(refused)) == (400, True)
    finally:
        pictures.shutdown()
        thread.join()
        pictures.server_close()


def test_keys() -> None:
    keys = ["a-long-key", "another-key"]
    with serving(keys=keys) as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a-long-key"}):
            for path, body in ((CHAT, HELLO), ("/metrics", None), ("/v1/models", None), ("/tokenize", HELLO)):
                status, answer = served.ask(path, body, headers)
                assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert served.ask("/health")[0] == served.ask("/")[0] == 200
        for key in keys:
            assert served.ask(CHAT, HELLO, {"Authorization": f"Bearer {key}"})[0] == 200
            assert served.ask("/metrics", None, {"Authorization": f"Bearer {key}"})[0] == 200
        assert not any(key in line for line in served.lines for key in keys)


def test_other_hosts_and_kinds_of_bodies(small: Serving) -> None:
    assert small.ask(CHAT, HELLO, {"Host": "evil.example"})[0] == 403
    assert small.ask(CHAT, HELLO, {"Host": "localhost:1234"})[0] == 200
    status, answer = small.ask(CHAT, HELLO, {"Content-Type": "text/plain"})
    assert (status, error_of(answer)) == (415, "expected Content-Type: application/json")
    assert small.ask("/nowhere")[0] == 404
    assert small.ask(CHAT)[0] == 405
    with serving(hosts=["models.example"]) as named:
        assert named.ask(CHAT, HELLO, {"Host": "models.example"})[0] == 200


def test_pages_elsewhere_are_refused_unless_they_are_named(small: Serving) -> None:
    def allowed(port: int) -> str | None:
        connection = HTTPConnection("127.0.0.1", port)
        headers = {
            "Origin": "https://page.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        connection.request("OPTIONS", CHAT, headers=headers)
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.getheader("access-control-allow-origin")

    assert allowed(small.port) is None
    with serving(origins=["https://page.example"], keys=["a-long-key"]) as served:
        assert allowed(served.port) == "https://page.example"


class _Slow:
    """Lets nothing be drawn before it is told to."""

    def __init__(self, model: Qwen2VL, monkeypatch: pytest.MonkeyPatch) -> None:
        from qwen2vl_q.engine.scheduler import Scheduler

        self.go = threading.Event()
        step: Callable[[Scheduler], None] = Scheduler._step

        def waiting(scheduler: Scheduler) -> None:
            self.go.wait(30)
            step(scheduler)

        monkeypatch.setattr(Scheduler, "_step", waiting)


def test_a_queue_that_is_full(small: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = _Slow(small.model, monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(small.ask, CHAT, HELLO) for _ in range(3)]
        while small.metric("qwen2vl_q_running_answers") < 2 or small.metric("qwen2vl_q_queued_requests") < 1:
            sleep(0.01)
        connection = HTTPConnection("127.0.0.1", small.port)
        connection.request(
            "POST",
            CHAT,
            b'{"messages": [{"role": "user", "content": "x"}]}',
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("retry-after")) == (429, "1")
        connection.close()
        assert small.ask("/health")[1] == {"status": "ok", "running": 2, "queued": 1}
        slow.go.set()
        assert [status for status, _ in (future.result() for future in asked)] == [200] * 3
    small.wait_until_idle()


def test_bodies_that_are_too_large_together(small: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    connections = []
    for _ in range(4):  # each holds its place before its end has come
        connection = HTTPConnection("127.0.0.1", small.port)
        connection.putrequest("POST", CHAT)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(2**20))
        connection.endheaders()
        connection.send(b" " * 900_000)
        connections.append(connection)
        while small.metric("qwen2vl_q_held_body_bytes") < min(3, len(connections)) * 900_000:
            sleep(0.01)
    answer = connections[3].getresponse()
    assert (answer.status, b"too many large requests" in answer.read()) == (429, True)
    for connection in connections:
        connection.close()
    while small.metric("qwen2vl_q_held_body_bytes"):
        sleep(0.01)


def test_a_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(limits=Limits(seconds=0.3)) as served:
        slow = _Slow(served.model, monkeypatch)
        status, answer = served.ask(CHAT, HELLO)
        slow.go.set()
        assert (status, answer["error"]["type"]) == (504, "timeout_error")
        served.wait_until_idle()
        assert served.ask(CHAT, HELLO)[0] == 200


def test_a_step_that_fails_ends_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller is told so; the others' answers are as ever."""
    from qwen2vl_q import _native

    with serving() as served:
        truth = card(0)[1]
        talk = {"messages": about(card(0)[0]), "temperature": 0}
        step, left = _native.step, [1]

        def failing(*arguments: Any) -> Any:
            if left:
                left.clear()
                raise RuntimeError("a crash")
            return step(*arguments)

        monkeypatch.setattr(_native, "step", failing)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: served.ask(CHAT, talk), range(4)))
        told = sorted(status for status, _ in found)
        assert told == [200, 200, 200, 500]
        for status, answer in found:
            if status == 200:
                assert answer["choices"][0]["message"]["content"] == truth
            else:
                assert answer["error"] == {
                    "message": "internal error",
                    "type": "server_error",
                    "param": None,
                    "code": None,
                }
        assert any("RuntimeError: a crash" in line for line in served.lines)


def test_the_log_says_nothing_of_what_was_said(small: Serving) -> None:
    small.lines.clear()
    secret = "xylophone"
    small.ask(CHAT, {**HELLO, "messages": [{"role": "user", "content": secret}]})
    small.ask(CHAT, with_parts({"type": "text", "text": secret}, image_part(png(card(0)[0]))))
    small.wait_until_idle()
    while len(small.lines) < 3:  # the metrics' own comes after the two
        sleep(0.01)
    assert not any(secret in line for line in small.lines)
    assert "POST /v1/chat/completions 200" in small.lines[0]
    assert "image=42" in small.lines[1]


def test_options_of_the_command(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("serve", "--api-key", "short")
    assert (code, "8 characters or more" in errors) == (1, True)
    (tmp_path / "keys").write_text("\n")
    code, _, errors = run("serve", "--api-key-file", tmp_path / "keys")
    assert (code, "expected keys, one a line" in errors) == (1, True)
    code, _, errors = run("serve", "--host", "nowhere.invalid")
    assert (code, "nowhere.invalid:8080" in errors) == (1, True)
    code, _, errors = run("serve", "--mmproj", tmp_path / "keys", "--no-mmproj")
    assert code == 2


def test_every_limit_is_an_option() -> None:
    from qwen2vl_q.cli.serve import _LIMITS

    assert {field.name for field in fields(Limits)} == {field for field, _ in _LIMITS.values()}


def test_metrics_count(small: Serving) -> None:
    before = small.metric('qwen2vl_q_tokens_total{kind="drawn"}')
    small.ask(CHAT, {**HELLO, "max_tokens": 5, "temperature": 0})
    drawn = small.metric('qwen2vl_q_tokens_total{kind="drawn"}') - before
    assert 1 <= drawn <= 5
    assert small.metric("qwen2vl_q_weight_bytes") > 10**6
    assert small.metric("process_resident_memory_bytes") > 10**7
    assert io.BytesIO(small.ask("/metrics")[1]).readline().startswith(b"# HELP")
    assert data_uri(card(0)[0]).startswith("data:")
