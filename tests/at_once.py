"""Calls that are made at once, for tests of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Barrier, Thread
from typing import Any

import pytest

from demo import cases
from qwen2vl_q import Qwen2VL

SEED = 700_000
TASKS = ("what", "read", "count", "box", "chat")
PAGE = 64  # cells
IDS = list(range(3, 100))

Messages = list[dict[str, Any]]


def conversation(seed: int) -> Messages:
    case = cases.case(TASKS[seed % len(TASKS)], SEED + seed)
    content = [
        *({"type": "image", "image": image} for image in case.images),
        {"type": "text", "text": case.turns[0].question},
    ]
    return [{"role": "user", "content": content}]


def assert_all_given_back(model: Qwen2VL) -> None:
    assert not model._generation.scheduler._running and not model._generation.scheduler._waiting
    native = model._native
    assert native.idle_pages * PAGE * native.cell_bytes == native.cache_bytes


def in_threads(calls: list[Callable[[], None]]) -> None:
    """All at once. The first exception comes out."""
    errors: list[BaseException] = []
    barrier = Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        barrier.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=[call], daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a call hangs"
    if errors:
        raise errors[0]


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()


def beside(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that are made at once."""
    found: list[Any] = [None] * len(calls)

    def keep(i: int) -> None:
        found[i] = calls[i]()

    in_threads([partial(keep, i) for i in range(len(calls))])
    return found


def seeing(picture: Any, text: str = "What is it?") -> Messages:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
