"""A server in this process, for tests to ask."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from time import monotonic, sleep
from typing import Any

import uvicorn
from openai import OpenAI
from PIL import Image

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo import cards
from qwen2vl_q.serve.app import Settings, make_app

WHAT = "What is in the picture?"


@dataclass
class Serving:
    """port: where. lines: the last of its log. failures: all that tell of a 500."""

    model: Qwen2VL
    port: int
    server: uvicorn.Server
    lines: deque[str]
    failures: list[str]

    @property
    def client(self) -> Any:
        """The official one; its types want literals."""
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=60)

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str = ""
    ) -> tuple[int, Any]:
        """(status, body); body: JSON, or bytes as they are."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(
            method or ("GET" if data is None else "POST"),
            path,
            data,
            {"Content-Type": "application/json", **(headers or {})},
        )
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        if answer.getheader("content-type", "").startswith("application/json"):
            return answer.status, json.loads(text)
        return answer.status, text

    def metric(self, name: str) -> float:
        """Of all its labels."""
        text = self.ask("/metrics")[1].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def wait_until_idle(self) -> None:
        end = monotonic() + 30
        while self.metric("qwen2vl_q_running_answers") or self.metric("qwen2vl_q_queued_requests"):
            assert monotonic() < end
            sleep(0.01)


@contextmanager
def serving(model: Qwen2VL | None = None, **settings: Any) -> Iterator[Serving]:
    model = model or Qwen2VL.from_gguf(DEMO_MODEL, n_ctx=4096)
    lines: deque[str] = deque(maxlen=10_000)  # all of half an hour are 100 MB
    failures: list[str] = []

    def write(line: str) -> None:
        lines.append(line)
        if " 500 " in line:
            failures.append(line)

    app = make_app(model, Settings(name="demo", write=write, **settings))
    config = uvicorn.Config(
        app, port=0, log_level="error", http="h11", ws="none", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Serving(model, port, server, lines, failures)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def card(seed: int) -> tuple[Image.Image, str]:
    """A card, and what is on it."""
    picture, things = cards.example(seed)
    everything = cards.listing([cards.article(thing.full_name) for thing in things])
    return picture, f"A{everything[1:]}."


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_uri(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def about(picture: Image.Image, question: str = WHAT, **url: Any) -> list[Any]:
    """A question about a picture."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_uri(picture), **url}},
                {"type": "text", "text": question},
            ],
        }
    ]
