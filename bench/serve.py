"""Loads `qwen2vl-q serve`, and llama.cpp's llama-server beside it, with the same requests in turns.

Open loop: requests come at random times (Poisson) whether or not earlier ones have been answered, texts and
pictures mixed, the same for both by --seed; of each rate the times to the first token and between tokens,
tokens a second, and memory. Then what is promised of fairness: a photo beside a stream, many streams beside
one, crops of a page together and one by one. It needs httpx (the extra dev).

llama-server is built from llama.cpp's source (or llama-cpp-python's source package, which holds it):

\b
  cmake -S llama.cpp -B build -DGGML_NATIVE=ON && cmake --build build --target llama-server
  python bench/serve.py --llama-server build/bin/llama-server
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
from PIL import Image

from peers import llama_cpp_files, our_files
from qwen2vl_q._native import default_thread_count
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.measure.benchmark import drawn_picture

_ANSWER = 32  # tokens
_SLOTS = 8
_CONTEXT = 2048  # tokens of a slot
_WORDS = [f"{sound}{end}" for sound in ("ba", "do", "ki", "lu", "me", "po", "ra") for end in ("n", "st", "l")]
_CROPS = 32
_CROP_TOKENS = (24, 48, 96)
_NEVER = {str(token): -100 for token in (151643, 151645)}  # what would end an answer


@dataclass(frozen=True)
class Server:
    name: str
    command: tuple[str, ...]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 300
            while True:
                try:
                    if httpx.get(f"{self.url}/health").status_code == 200:
                        break
                except httpx.HTTPError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise click.ClickException(f"{self.name} does not start") from None
                time.sleep(0.2)
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Visit:
    """One request: when it was sent, and when each piece of its answer came."""

    kind: str
    sent: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""

    @property
    def first(self) -> float:
        return self.pieces[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.pieces)]


def text_request(rng: random.Random, words: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": " ".join(rng.choices(_WORDS, k=words)) + "?"}]


def picture_request(rng: random.Random, size: tuple[int, int]) -> list[dict[str, Any]]:
    picture = Image.fromarray(drawn_picture(size))
    picture.putpixel((0, 0), tuple(rng.randrange(256) for _ in range(3)))  # like no other
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is this?"},
            ],
        }
    ]


async def visit(
    client: httpx.AsyncClient, kind: str, messages: Any, tokens: int, found: Visit | None = None
) -> Visit:
    """found: filled as it goes."""
    body = {
        "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "logit_bias": _NEVER,
        "prompt_lookup_num_tokens": 0,  # random weights repeat themselves; llama-server does not know it
    }  # fmt: skip
    found = found or Visit(kind, 0)
    found.sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                found.error = (await answer.aread()).decode(errors="replace")[:200]
                return found
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                found.tokens = (chunk.get("usage") or {}).get("completion_tokens", found.tokens)
                if _has_content(chunk):
                    found.pieces.append(time.perf_counter())
    except httpx.HTTPError as error:
        found.error = repr(error)
    return found


def _has_content(chunk: dict[str, Any]) -> bool:
    """Random weights draw special tokens, too, which make no text: then the end of an answer counts."""
    choices = chunk.get("choices") or [{}]
    return bool((choices[0].get("delta") or {}).get("content") or choices[0].get("finish_reason"))


def client_of(server: Server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=256)
    return httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits)


# --- open loop ---


@dataclass(frozen=True)
class Arrival:
    at: float
    kind: str
    messages: Any


def arrivals(rate: float, seconds: float, pictures: float, seed: int) -> list[Arrival]:
    rng = random.Random(seed)
    found, at = [], rng.expovariate(rate)
    while at < seconds:
        if rng.random() < pictures:
            found.append(Arrival(at, "picture", picture_request(rng, (448, 448))))
        else:
            found.append(Arrival(at, "text", text_request(rng, rng.randint(16, 256))))
        at += rng.expovariate(rate)
    return found


async def open_loop(server: Server, coming: Sequence[Arrival]) -> list[Visit]:
    async with client_of(server) as client:
        start = time.perf_counter()

        async def one(arrival: Arrival) -> Visit:
            await asyncio.sleep(max(0, start + arrival.at - time.perf_counter()))
            return await visit(client, arrival.kind, arrival.messages, _ANSWER)

        return list(await asyncio.gather(*map(one, coming)))


def row_of(name: str, rate: float, visits: Sequence[Visit], pid: int) -> tuple[str, ...]:
    good = [v for v in visits if not v.error and v.pieces]
    memory = f"{peak_bytes(pid) / 1e9:.2f}"
    if not good:
        return f"{rate:g}/s", name, f"0 of {len(visits)}", *"-----", memory
    firsts = sorted(v.first for v in good)
    gaps = sorted(gap for v in good for gap in v.gaps)
    span = max(v.pieces[-1] for v in good) - min(v.sent for v in good)
    return (
        f"{rate:g}/s",
        name,
        f"{len(good)} of {len(visits)}",
        *(f"{at(firsts, q):.2f}" for q in (0.5, 0.99)),
        *(f"{1000 * at(gaps, q):.0f}" for q in (0.5, 0.99)),
        f"{sum(v.tokens for v in good) / span:.1f}",
        memory,
    )


def at(ordered: Sequence[float], quantile: float) -> float:
    return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else float("nan")


def peak_bytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return float("nan")


# --- fairness ---


async def photo_beside_a_stream(server: Server) -> tuple[str, str]:
    """Tokens a second of a stream while a photo of 1024 x 683 is in work, and its longest gap."""
    rng = random.Random(1)
    async with client_of(server) as client:
        seen = Visit("text", 0)
        stream = asyncio.ensure_future(visit(client, "text", text_request(rng, 16), 1500, seen))
        await asyncio.sleep(3)
        photo = await visit(client, "picture", picture_request(rng, (1024, 683)), 1)
        await asyncio.sleep(0.5)
        stream.cancel()
        await asyncio.wait((stream,))
        within = [t for t in seen.pieces if photo.sent <= t <= photo.pieces[0]]
        edges = [photo.sent, *within, photo.pieces[0]]
        longest = max(b - a for a, b in pairwise(edges))
        return f"{len(within) / photo.first:.1f}", f"{longest:.2f}"


async def streams(server: Server, n: int) -> float:
    """Tokens a second of all."""
    rng = random.Random(n)
    async with client_of(server) as client:
        visits = await asyncio.gather(*(visit(client, "text", text_request(rng, 16), 96) for _ in range(n)))
    begin, end = max(v.pieces[0] for v in visits), min(v.pieces[-1] for v in visits)
    return sum(sum(begin < t <= end for t in v.pieces) for v in visits) / (end - begin)


async def crops(server: Server, tokens: int, together: bool) -> float:
    """Requests a second for crops of a page of 448 x 112 that are answered in so many tokens."""
    rng = random.Random(2 * tokens + together)
    asked = [picture_request(rng, (448, 112)) for _ in range(_CROPS)]
    async with client_of(server) as client:
        start = time.perf_counter()
        if together:
            await asyncio.gather(*(visit(client, "picture", messages, tokens) for messages in asked))
        else:
            for messages in asked:
                await visit(client, "picture", messages, tokens)
        return _CROPS / (time.perf_counter() - start)


def fairness(server: Server) -> tuple[str, ...]:
    async def all_of_it() -> tuple[str, ...]:
        rate, gap = await photo_beside_a_stream(server)
        one, eight = median([await streams(server, 1) for _ in range(3)]), await streams(server, 8)
        of_crops = []
        for tokens in _CROP_TOKENS:
            alone, together = await crops(server, tokens, False), await crops(server, tokens, True)
            of_crops += [f"{alone:.2f}", f"{together:.2f} ({together / alone:.1f} x)"]
        return (
            server.name,
            rate,
            gap,
            f"{one:.1f}",
            f"{eight:.1f} ({eight / one:.1f} x)",
            *of_crops,
        )

    return asyncio.run(all_of_it())


# --- the command ---


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@click.command(help=__doc__)
@click.option("--llama-server", type=click.Path(exists=True, dir_okay=False), help="[default: ours alone]")
@click.option("--folder", type=click.Path(path_type=Path), default="peers-models", show_default=True)
@click.option("--size", type=click.Choice(["2b", "7b"]), default="2b", show_default=True)
@click.option("--type", "type_", type=click.Choice(["q4_0", "q8_0"]), default="q4_0", show_default=True)
@click.option("--rate", "rates", type=click.FloatRange(min=0.01), multiple=True, default=(0.25, 0.5, 1.0))
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=60.0, show_default=True, help="Of each rate."
)
@click.option(
    "--pictures", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Share of requests."
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--fair/--no-fair", default=True, help="Measure fairness, too.")
def main(
    llama_server: str | None,
    folder: Path,
    size: str,
    type_: str,
    rates: tuple[float, ...],
    seconds: float,
    pictures: float,
    seed: int,
    threads: int | None,
    fair: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n = str(threads or default_thread_count())
    servers = [_ours(our_files(folder, size, type_)["model"], n)]
    if llama_server:
        servers.append(_llama(llama_server, llama_cpp_files(folder, size, type_), n))
    rows = []
    for rate in rates:
        coming = arrivals(rate, seconds, pictures, seed)
        for server in servers:
            click.echo(f"{rate:g} a second: {server.name}, {len(coming)} requests", err=True)
            with server.running() as process:
                visits = asyncio.run(open_loop(server, coming))
                rows.append(row_of(server.name, rate, visits, process.pid))
            for error in {v.error for v in visits if v.error}:
                click.echo(f"  {error}", err=True)
    heading = (
        "requests", "server", "answered", "first token s, p50", "p99", "between ms, p50", "p99", "tokens/s",
        "GB",
    )  # fmt: skip
    print(table([heading, *rows]))
    if fair:
        print()
        found = []
        for server in servers:
            click.echo(f"fairness: {server.name}", err=True)
            with server.running():
                found.append(fairness(server))
        fair_heading = (
            "server", "a stream beside a photo, tokens/s", "its longest gap s", "one stream", "eight",
            *(text for n in _CROP_TOKENS for text in (f"crops of {n} tokens one by one, 1/s", "32 together")),
        )  # fmt: skip
        print(table([fair_heading, *found]))


def _ours(model: str, threads: str) -> Server:
    port = free_port()
    command = (sys.executable, "-m", "qwen2vl_q", "serve", "-m", model, "--port", str(port), "-t", threads)
    return Server("ours", (*command, "--max-answers", "32", "--max-queued", "1000"), port)


def _llama(program: str, files: dict[str, str], threads: str) -> Server:
    port = free_port()
    command = (
        program, "-m", files["model"], "--mmproj", files["mmproj"], "--port", str(port), "-t", threads,
        "-tb", threads, "-np", str(_SLOTS), "-cb", "-c", str(_SLOTS * _CONTEXT), "--no-warmup",
    )  # fmt: skip
    return Server("llama-server", command, port)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()
