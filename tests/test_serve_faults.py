"""The server among clients that come and go, ask for nonsense, or do not listen."""

from __future__ import annotations

import json
import os
import random
import socket
import string
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
from PIL import Image

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.serve.limits import Limits
from serving import Serving, about, card, png, serving
from test_serve_limits import CHAT, claims, image_part

CLIENTS, ANSWERS = 50, 8
CACHE_BYTES = 2**26  # full within seconds: what grows then is lost
SECONDS = {"short": 6.0, "long": 1800.0}


def raw_request(body: bytes, length: int | None = None) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


class Crowd:
    """Clients of one server; each call of `act` is one client's whole visit."""

    def __init__(self, served: Serving) -> None:
        self.served = served
        self.talks = [about(card(seed)[0]) for seed in range(6)]
        self.talks += [[{"role": "user", "content": f"What is {i}?"}] for i in range(4)]
        self.alone = [self.right(i) for i in range(len(self.talks))]
        self.bombs = [
            image_part(claims(60000, 60000)),
            image_part(png(Image.new("L", (1, 1)))),
            image_part(png(Image.new("1", (12000, 5500)))),
        ]
        self.answered = 0

    def body(self, i: int, **more: Any) -> dict[str, Any]:
        return {"messages": self.talks[i], "temperature": 1.2, "seed": i, "max_tokens": 40, **more}

    def right(self, i: int) -> str:
        while True:
            status, answer = self.served.ask(CHAT, self.body(i))
            if status == 200:
                text: str = answer["choices"][0]["message"]["content"]
                return text
            assert status == 429, answer
            time.sleep(0.02)

    def act(self, seed: int) -> None:
        rng = random.Random(seed)
        visits = [self.asks] * 6 + [
            self.leaves,
            self.reads_slowly,
            self.shuts_its_half,
            self.sends_half,
            self.sends_bombs,
            self.sends_nonsense,
        ]
        rng.choice(visits)(rng)

    def asks(self, rng: random.Random) -> None:
        i = rng.randrange(len(self.talks))
        assert self.right(i) == self.alone[i]
        self.answered += 1

    def open(self, data: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.served.port), timeout=60)
        connection.sendall(data)
        return connection

    def leaves(self, rng: random.Random) -> None:
        body = json.dumps(self.body(rng.randrange(10), stream=rng.random() < 0.7, max_tokens=400)).encode()
        with self.open(raw_request(body)) as connection:
            time.sleep(rng.random() * 0.05)
            if rng.random() < 0.5:
                connection.recv(64)

    def reads_slowly(self, rng: random.Random) -> None:
        i = rng.randrange(len(self.talks))
        with self.open(raw_request(json.dumps(self.body(i, stream=True)).encode())) as connection:
            found = b""
            while b"[DONE]" not in found and b"error" not in found:
                found += connection.recv(500)
                time.sleep(0.002)
        if b" 200 " in found[:20]:
            lines = [line[6:] for line in found.decode().splitlines() if line.startswith("data: {")]
            deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
            assert "".join(delta.get("content") or "" for delta in deltas) == self.alone[i]
            self.answered += 1

    def shuts_its_half(self, rng: random.Random) -> None:
        """Which a server may take for leaving."""
        with self.open(raw_request(json.dumps(self.body(rng.randrange(10))).encode())) as connection:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass

    def sends_half(self, rng: random.Random) -> None:
        with self.open(raw_request(b'{"messages": [', 5000)):
            time.sleep(rng.random() * 0.05)

    def sends_bombs(self, rng: random.Random) -> None:
        part = rng.choice([*self.bombs, image_part(b"GIF89a" + rng.randbytes(200))])
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        status, answer = self.served.ask(CHAT, body)
        assert status in (200, 400, 429), answer

    def sends_nonsense(self, rng: random.Random) -> None:
        status, answer = self.served.ask(CHAT, mutated(rng, self.body(7)))
        assert status in (200, 400, 404, 429), answer


def mutated(rng: random.Random, body: Any) -> bytes:
    """JSON of the same form with something wrong, or what is hardly JSON."""
    data = bytearray(json.dumps(_changed(rng, body, 3), ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if data and rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(max(1, len(data)))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
    return bytes(data)


_VALUES: list[Any] = [
    None, True, 0, -1, 1e308, 2**70, "", "x" * 3000, [], {}, [[]], {"": {}}, "\ud800", "\x00", "<|im_end|>",
    ["a", 1], {"type": "image"}, {"type": "json_schema"}, [{"type": "function"}],
]  # fmt: skip
_FIELDS = [
    "messages", "stop", "n", "seed", "tools", "tool_choice", "logit_bias", "response_format", "regex",
    "grammar", "stream", "stream_options", "logprobs", "top_logprobs", "temperature", "top_p", "model",
    "user", "chat_template_kwargs", "max_completion_tokens", "add_vision_id", "prompt", "unknown",
]  # fmt: skip


def _changed(rng: random.Random, value: Any, depth: int) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.8:
        found = dict(value)
        key = rng.choice(list(found))
        if rng.random() < 0.4:
            found[rng.choice(_FIELDS)] = rng.choice(_VALUES)
        elif rng.random() < 0.2:
            del found[key]
        elif depth:
            found[key] = _changed(rng, found[key], depth - 1)
        return found
    if isinstance(value, list) and value and rng.random() < 0.8:
        items = list(value)
        at = rng.randrange(len(items))
        items[at] = _changed(rng, items[at], depth - 1) if depth else rng.choice(_VALUES)
        return items
    if isinstance(value, str) and rng.random() < 0.3:
        return value + "".join(rng.choices(string.printable, k=5))
    return rng.choice(_VALUES)


def test_malformed_bodies_are_the_client_s_fault() -> None:
    """Never a 5xx, and the server goes on."""
    rng, count = random.Random(2), 2000
    with serving(limits=Limits(output_tokens=64)) as served:
        body = Crowd(served).body(7, max_tokens=2, stop=["x"], logit_bias={"5": 1})
        statuses = {200: 0}
        for _ in range(count):
            data = mutated(rng, body)
            path = rng.choice([CHAT, CHAT, "/v1/completions", "/tokenize", "/detokenize"])
            status, answer = served.ask(path, data)
            assert status == 200 or 400 <= status < 500, (path, data, answer)
            if status != 200:
                assert answer["error"]["message"]
            statuses[status] = statuses.get(status, 0) + 1
        assert statuses[400] > count // 2, statuses
        assert not served.failures


@pytest.mark.parametrize("length", ["short", pytest.param("long", marks=pytest.mark.soak)])
def test_a_crowd(length: str, request: pytest.FixtureRequest) -> None:
    """Every answer is the one given alone; nothing is lost, and memory stays."""
    if length == "long" and "soak" not in request.config.option.markexpr:
        pytest.skip("half an hour: asked for with -m soak")
    over, begin = Event(), time.monotonic()
    seconds = float(os.environ.get("QWEN2VL_CROWD_SECONDS", SECONDS[length]))
    model = Qwen2VL.from_gguf(DEMO_MODEL, n_ctx=4096, cache_bytes=CACHE_BYTES)
    with serving(model, limits=Limits(answers=ANSWERS, queued=20, output_tokens=512)) as served:
        crowd = Crowd(served)

        def visit(client: int) -> None:
            n = 0
            while not over.is_set() and time.monotonic() < begin + seconds:
                n += 1
                try:
                    crowd.act(client * 10**6 + n)
                except (ConnectionError, TimeoutError) as error:  # a server that has gone, or hangs
                    over.set()
                    raise AssertionError("the server does not answer") from error
                except BaseException:
                    over.set()
                    raise

        for i in range(len(crowd.talks) * 2):  # caches are full before memory is looked at
            crowd.right(i % len(crowd.talks))
        before = served.metric("process_resident_memory_bytes")
        with ThreadPoolExecutor(CLIENTS) as pool:
            for visited in [pool.submit(visit, i) for i in range(CLIENTS)]:
                visited.result()
        served.wait_until_idle()
        assert crowd.answered > 100
        assert [crowd.right(i) for i in range(len(crowd.talks))] == crowd.alone
        assert served.metric("qwen2vl_q_held_body_bytes") == 0
        assert not served.failures
        grown = served.metric("process_resident_memory_bytes") - before
        assert grown < CACHE_BYTES + 100e6, grown
        print(f"{crowd.answered} answers in {time.monotonic() - begin:.0f} s, {grown / 1e6:+.0f} MB")


def test_who_goes_away_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work stops within a step: what it asked for is far from drawn."""
    with serving(limits=Limits(output_tokens=4000)) as served:
        talk = [{"role": "user", "content": "Count."}]
        body = {
            "messages": talk, "max_tokens": 3500, "temperature": 3.0, "stream": True, "logit_bias": {}
        }  # fmt: skip
        ends = {str(token): -100 for token in served.model.config.eos_token_ids}
        connection = socket.create_connection(("127.0.0.1", served.port))
        connection.sendall(raw_request(json.dumps({**body, "logit_bias": ends}).encode()))
        found = b""
        while found.count(b"data:") < 5:
            found += connection.recv(4096)
        connection.close()
        served.wait_until_idle()
        drawn = served.metric('qwen2vl_q_tokens_total{kind="drawn"}')
        assert 4 <= drawn < 2000
        assert any(" 499 " in line or "finish=cut" in line for line in served.lines)


def test_a_stop_lets_answers_end() -> None:
    """What is under way is answered to its end; then nobody listens."""
    with serving() as served, ThreadPoolExecutor(1) as pool:
        ends = {str(token): -100 for token in served.model.config.eos_token_ids}
        body = {
            "messages": [{"role": "user", "content": "Count."}], "max_tokens": 1500, "logit_bias": ends
        }  # fmt: skip
        asked = pool.submit(served.ask, CHAT, body)
        while served.metric("qwen2vl_q_running_answers") == 0:
            time.sleep(0.005)
        served.server.should_exit = True
        status, answer = asked.result()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 1500)
    with pytest.raises(ConnectionError):
        served.ask("/health")
