"""Mixed conversations with the packaged model for a while: every answer as it is alone, memory flat.

python tests/soak.py --seconds 600
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # demo/ is not installed

from demo import cases
from qwen2vl_q import DEMO_MODEL, Qwen2VL

SEED = 800_000
TASKS = ("what", "read", "count", "box", "chat", "which", "differ", "second")
CONVERSATIONS = 64
THREADS, COROUTINES = 4, 6
PAGE = 64  # cells
CACHE_PAGES = 96  # all at work have room, all conversations have not
GROWTH = 12e6  # bytes of memory that may be added after the warm-up
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_new_tokens": 24}

Messages = list[dict[str, Any]]


def conversation(seed: int) -> Messages:
    """With none, one or two pictures, and sometimes a turn before the question."""
    case = cases.case(TASKS[seed % len(TASKS)], SEED + seed)
    messages: Messages = []
    for turn in case.turns:
        messages += [
            {"role": "user", "content": [{"type": "text", "text": turn.question}]},
            {"role": "assistant", "content": turn.answer},
        ]
    messages[0]["content"][:0] = [{"type": "image", "image": image} for image in case.images]
    return messages[:-1]


def resident_bytes() -> int:
    """Linux's figure of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    seconds: float
    answers: int  # whole ones so far, each of them right
    parts: int  # beginnings of answers that were left or stopped, each of them right
    resident: int  # bytes
    pages: int  # in use or kept

    def __str__(self) -> str:
        return (
            f"{self.seconds:6.0f} s  {self.answers:8,} answers  {self.parts:8,} parts  "
            f"{self.resident / 1e6:7.1f} MB  {self.pages:3} pages"
        )


def growth(samples: Sequence[Sample]) -> float:
    """Bytes of memory that the last fifth of the time has more than the second fifth: the first warms up."""
    total = samples[-1].seconds

    def middle(begin: float, end: float) -> float:
        return median(s.resident for s in samples if begin * total <= s.seconds <= end * total)

    return middle(0.8, 1) - middle(0.2, 0.4)


class Wrong(Exception):
    """An answer that differs."""


class Soak:
    """What its threads and coroutines have found."""

    def __init__(self, model: Qwen2VL, conversations: int = CONVERSATIONS) -> None:
        self.model = model
        self.talks = [conversation(seed) for seed in range(conversations)]
        self.alone = {id(GREEDY): self._answers(GREEDY), id(DRAWN): self._answers(DRAWN)}
        self.counts: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self._end = Event()

    def _answers(self, sampling: dict[str, Any]) -> list[str]:
        answers = []
        for talk in self.talks:
            self.model.reset()
            answers.append(self.model.chat(talk, False, **sampling))
        return answers

    def run(self, seconds: float, tell: Callable[[Sample], None] = lambda _: None) -> list[Sample]:
        """Samples, one a second or more. The first error of any thread comes out."""
        workers = [
            Thread(target=self._guard, args=[self._work, seed], daemon=True) for seed in range(THREADS)
        ]
        workers.append(
            Thread(target=self._guard, args=[lambda _: asyncio.run(self._work_async()), 0], daemon=True)
        )
        samples = []
        started = time.monotonic()
        for worker in workers:
            worker.start()
        while not self.errors and (passed := time.monotonic() - started) < seconds:
            samples.append(self._sample(passed))
            tell(samples[-1])
            if len(samples) % 30 == 0:
                self.model.reset()  # calls go on
            self._end.wait(min(1, seconds / 40))
        self._end.set()
        for worker in workers:
            worker.join(120)
            if worker.is_alive():
                raise TimeoutError("a call hangs")
        if self.errors:
            raise self.errors[0]
        samples.append(self._sample(time.monotonic() - started))
        tell(samples[-1])
        return samples

    def _sample(self, passed: float) -> Sample:
        native = self.model._native
        pages = native.cache_bytes // (PAGE * native.cell_bytes)
        return Sample(passed, self.counts["whole"], self.counts["part"], resident_bytes(), pages)

    def _guard(self, work: Callable[[int], None], seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            self.errors.append(error)

    def _require(self, i: int, sampling: dict[str, Any], found: str, whole: bool) -> None:
        expected = self.alone[id(sampling)][i]
        if not (found == expected if whole else expected.startswith(found)):
            raise Wrong(f"conversation {i}: expected {expected!r}, found {found!r}")
        self.counts["whole" if whole else "part"] += 1

    def _work(self, seed: int) -> None:
        """Calls of a thread: whole answers, pieces, lists, calls that are closed, dropped or fail."""
        rng = random.Random(seed)
        while not self._end.is_set():
            i, sampling = rng.randrange(len(self.talks)), rng.choice((GREEDY, DRAWN))
            match rng.randrange(6):
                case 0:
                    self._require(i, sampling, self.model.chat(self.talks[i], False, **sampling), True)
                case 1:
                    self._require(i, sampling, "".join(self.model.chat(self.talks[i], **sampling)), True)
                case 2:
                    chosen = rng.choices(range(len(self.talks)), k=3)
                    answers = self.model.chat([self.talks[i] for i in chosen], **sampling)
                    for i, answer in zip(chosen, answers, strict=True):
                        self._require(i, sampling, answer, True)
                case 3:
                    self._fail(self.talks[i], sampling)
                case leave:
                    pieces: Any = self.model.chat(self.talks[i], **sampling)
                    text = "".join(piece for piece, _ in zip(pieces, range(rng.randrange(5)), strict=False))
                    self._require(i, sampling, text, False)
                    if leave == 4:
                        pieces.close()

    def _fail(self, talk: Messages, sampling: dict[str, Any]) -> None:
        def stop(stage: str, done: int, total: int) -> None:
            raise InterruptedError

        try:
            self.model.chat(talk, False, progress=stop, **sampling)
        except InterruptedError:
            self.counts["part"] += 1
        else:
            raise Wrong("a call whose callback has raised went on")

    async def _work_async(self) -> None:
        await asyncio.gather(*(self._coroutine(100 + seed) for seed in range(COROUTINES)))

    async def _coroutine(self, seed: int) -> None:
        """Calls of asyncio: whole answers, pieces, calls that are left or cancelled."""
        rng = random.Random(seed)
        while not self._end.is_set():
            i, sampling = rng.randrange(len(self.talks)), rng.choice((GREEDY, DRAWN))
            match rng.randrange(3):
                case 0:
                    answer = await self.model.achat(self.talks[i], False, **sampling)
                    self._require(i, sampling, answer, True)
                case 1:
                    text, left = "", rng.randrange(1, 30)
                    async for piece in self.model.achat(self.talks[i], **sampling):
                        text += piece
                        if not (left := left - 1):
                            break
                    self._require(i, sampling, text, whole=left > 0)
                case _:
                    call = asyncio.ensure_future(self.model.achat(self.talks[i], False, **sampling))
                    await asyncio.wait([call], timeout=rng.uniform(0, 0.1))
                    if call.done():
                        self._require(i, sampling, call.result(), True)
                    else:
                        call.cancel()
                        await asyncio.wait([call])
                        self.counts["part"] += 1


def soak(
    seconds: float, most: float = GROWTH, tell: Callable[[Sample], None] = lambda _: None
) -> list[Sample]:
    """Runs it, and looks at pages and memory. Wrong where anything is not as it should be; `most`: bytes that
    memory may grow by."""
    model = Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2, n_ctx=1024)
    native = model._native
    page_bytes = PAGE * native.cell_bytes
    native.limit_cache(CACHE_PAGES * page_bytes)
    samples = Soak(model).run(seconds, tell)
    gc.collect()  # asyncio leaves circles behind what was cancelled
    idle, pages = native.idle_pages, native.cache_bytes // page_bytes
    if idle != pages:
        raise Wrong(f"pages: expected all given back, found {idle} of {pages}")
    if (used := max(sample.pages for sample in samples)) != CACHE_PAGES:
        raise Wrong(f"pages: expected the {CACHE_PAGES} that there is room for in use, found {used}")
    if (grown := growth(samples)) > most:
        raise Wrong(f"memory: expected {most / 1e6:.0f} MB more at most, found {grown / 1e6:.1f} MB")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    seconds: float = parser.parse_args().seconds
    shown = -1.0

    def tell(sample: Sample) -> None:
        nonlocal shown
        if sample.seconds - shown >= seconds / 30 or sample.seconds >= seconds:
            shown = sample.seconds
            print(sample, flush=True)

    samples = soak(seconds, tell=tell)
    print(f"every answer right; memory after the warm-up {growth(samples) / 1e6:+.1f} MB")


if __name__ == "__main__":
    main()
