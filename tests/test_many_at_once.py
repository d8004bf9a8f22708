"""Many calls at once on one instance: threads and asyncio, abandoned, cancelled and failing ones."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from at_once import (
    IDS,
    PAGE,
    SEED,
    Messages,
    assert_all_given_back,
    conversation,
    in_threads,
    raises,
)
from demo import cases
from qwen2vl_q import DEMO_MODEL, CacheFullError, Qwen2VL, Qwen2VLError, _native
from qwen2vl_q.engine import scheduler
from qwen2vl_q.engine.scheduler import Scheduler

# --- answers ---


def test_forty_conversations_at_once(demo: Qwen2VL, rows: list[list[int]]) -> None:
    """Half of them from threads, half from asyncio; of each a fifth is left after a piece, a fifth closed or
    cancelled, and the others' answers are those that each would get alone."""
    talks = [conversation(seed) for seed in range(40)]
    expected = [demo.chat(talk, False, max_new_tokens=24, temperature=0) for talk in talks]
    demo.reset()
    rows.clear()
    found: dict[int, str] = {}
    begun: dict[int, str] = {}
    kept: list[Iterator[str]] = []

    def read(i: int) -> None:
        pieces = iter(demo.chat(talks[i], max_new_tokens=24, temperature=0))
        if i % 5 == 0:
            begun[i] = next(pieces)
            pieces.close()  # type: ignore[attr-defined]
        elif i % 5 == 1:
            begun[i] = next(pieces)
            kept.append(pieces)  # nobody reads on
        else:
            found[i] = "".join(pieces)

    async def read_async(i: int) -> None:
        if i % 5 == 2:
            found[i] = await demo.achat(talks[i], False, max_new_tokens=24, temperature=0)
            return
        pieces: AsyncIterator[str] = demo.achat(talks[i], max_new_tokens=24, temperature=0)
        text = ""
        async for piece in pieces:
            text += piece
            begun[i] = text
            if i % 5 == 0:
                break
            if i % 5 == 1:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(0)
        else:
            found[i] = text

    async def read_all() -> None:
        results = await asyncio.gather(*(read_async(i) for i in range(20, 40)), return_exceptions=True)
        cancelled = [i for i, result in enumerate(results) if isinstance(result, asyncio.CancelledError)]
        assert cancelled == [1, 6, 11, 16]
        assert [result for result in results if isinstance(result, Exception)] == []

    in_threads([*(partial(read, i) for i in range(20)), lambda: asyncio.run(read_all())])
    assert found == {i: expected[i] for i in range(40) if i % 5 > 1}
    assert all(expected[i].startswith(text) for i, text in begun.items()) and len(begun) >= 16
    assert max(map(len, rows)) > 1  # they did share steps; how many do is the machine's affair
    assert len(kept) == 4
    kept.clear()
    assert_all_given_back(demo)
    assert [demo.chat(talk, False, max_new_tokens=24, temperature=0) for talk in talks[:3]] == expected[:3]


def test_a_list_of_conversations(demo: Qwen2VL, rows: list[list[int]]) -> None:
    talks = [conversation(seed) for seed in range(70)]  # more than run at once
    answers = demo.chat(talks, max_new_tokens=24, temperature=0)
    assert_all_given_back(demo)
    assert max(map(len, rows)) > 10
    demo.reset()
    assert answers == [demo.chat(talk, False, max_new_tokens=24, temperature=0) for talk in talks]
    with pytest.raises(ValueError, match="message 0"):
        demo.chat([talks[0], [{"role": "user", "content": [{"type": "image"}]}]])
    assert_all_given_back(demo)


def test_seeds_decide_whatever_runs_beside(tiny: Qwen2VL) -> None:
    def draw(seed: int) -> Iterator[int]:
        return tiny.generate(IDS, max_new_tokens=20, temperature=3.0, seed=seed, ignore_eos=True)

    alone = [list(draw(seed)) for seed in range(6)]
    together: list[list[int]] = [[] for _ in alone]
    in_threads([lambda s=s: together[s].extend(draw(s)) for s in range(6)])  # type: ignore[misc]
    assert together == alone


# --- what is shared ---


def test_what_prompts_share_is_computed_once(demo: Qwen2VL, rows: list[list[int]]) -> None:
    """A system prompt and a picture, by the first of those that come at once and by later ones."""
    picture = cases.case("what", SEED).images[0]
    system = {"role": "system", "content": "You know about shapes. " * 20}
    talks: list[Messages] = []
    for text in ("What is in the picture?", "How many shapes are there?", "What does it say?", "Hello"):
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        talks.append([system, {"role": "user", "content": parts}])
    prompts = [demo.encode_chat(talk)[0] for talk in talks]
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert shared > 2 * PAGE
    encoded: list[str] = []
    demo.chat(talks, max_new_tokens=1, progress=lambda stage, *_: encoded.append(stage))
    assert encoded.count("image") >= 1 and demo._native.idle_pages > 0
    own = sum(len(prompt) - shared for prompt in prompts)
    assert sum(map(sum, rows)) <= shared + own + len(
        prompts
    )  # one row each at most where all of it is shared
    assert sum(map(sum, rows)) >= shared
    rows.clear()
    demo.chat(talks, max_new_tokens=1)
    assert sum(map(sum, rows)) == len(talks)  # a prompt's last token is computed again


def test_short_prompts_do_not_wait_for_long_ones(tiny: Qwen2VL, rows: list[list[int]]) -> None:
    stream = tiny.generate(IDS[:5], max_new_tokens=100, ignore_eos=True)
    next(stream)
    requests = []
    generation = tiny._generation
    for n in (1500, 20):
        prepared = generation.prepare([(7 * i + n) % 900 for i in range(n)], [])
        text = type("Text", (), {"finished": True, "push": lambda self, token: ""})()
        requests.append(generation.request(prepared, _native.Sampler(), 1, text, None))
        generation.scheduler.submit(requests[-1])
    rows.clear()
    next(stream)
    assert rows == [[1, 20, 108]]  # a token of the stream does not wait for 1,500 rows either
    assert [request.over for request in requests] == [False, True]
    assert requests[1].tokens and not requests[0].tokens


def test_a_stream_that_nobody_reads_is_not_computed_far(tiny: Qwen2VL, rows: list[list[int]]) -> None:
    one_by_one: dict[str, Any] = {"ignore_eos": True, "prompt_lookup_num_tokens": 0}
    idle = tiny.generate(IDS, max_new_tokens=1000, **one_by_one)
    expected = [next(idle)]
    list(tiny.generate(IDS[:50], max_new_tokens=60, **one_by_one))
    assert sum(len(taken) == 2 for taken in rows) < 20 < len(rows)
    expected += [next(idle) for _ in range(30)]
    assert expected == list(tiny.generate(IDS, max_new_tokens=31, ignore_eos=True))


# --- room ---


def test_old_pages_make_room(tiny_gguf: Path) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf, n_threads=1, n_ctx=256, precision="exact", cache_bytes=1)
    room = 6 * PAGE * model._native.cell_bytes
    model._native.limit_cache(room)
    prompts = [[(first + i) % 900 for i in range(130)] for first in range(10)]
    fresh = [list(model.generate(prompt, max_new_tokens=5, ignore_eos=True)) for prompt in prompts]
    assert model._native.cache_bytes == room
    assert [list(model.generate(p, max_new_tokens=5, ignore_eos=True)) for p in prompts] == fresh
    assert model._native.cache_bytes == room
    list(model.generate(prompts[-1], max_new_tokens=5, ignore_eos=True))
    assert model.last_stats.reused_tokens == 129
    list(model.generate(prompts[0], max_new_tokens=1, ignore_eos=True))
    assert model.last_stats.reused_tokens == 0


def test_where_room_ends_the_newest_call_does(tiny_gguf: Path) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf, n_threads=1, n_ctx=256, precision="exact")
    alone = list(model.generate(IDS, max_new_tokens=90, ignore_eos=True))
    other = list(model.generate(IDS[:50], max_new_tokens=20, ignore_eos=True))
    model.reset()
    model._native.limit_cache(5 * PAGE * model._native.cell_bytes)
    old = model.generate(IDS, max_new_tokens=90, ignore_eos=True)  # two pages, three in the end
    new = model.generate(IDS[:50], max_new_tokens=20, ignore_eos=True)  # one, two in the end
    found = [next(old)]
    assert [next(new) for _ in range(10)] == other[:10]
    newest = model.generate(IDS[::-1] + IDS[:50], max_new_tokens=1)  # three
    with pytest.raises(CacheFullError, match="the KV cache is full"):
        next(newest)
    assert next(new) == other[10]
    found += list(old)
    assert found == alone
    assert list(new) == other[11:]
    assert_all_given_back(model)
    model._native.limit_cache(3 * PAGE * model._native.cell_bytes)
    with pytest.raises(CacheFullError):  # alone, and too long for all of it
        list(model.generate(IDS * 2, max_new_tokens=9, ignore_eos=True))
    assert_all_given_back(model)
    assert list(model.generate(IDS, max_new_tokens=9, ignore_eos=True)) == alone[:9]


@pytest.mark.parametrize("picture", [True, False])
def test_conversations_that_have_no_room_wait(picture: bool, rows: list[list[int]]) -> None:
    """Pages for two of seven: the same answers, and a call that fits not even alone fails alone."""
    model = Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2)
    alone = []
    talks = [conversation(seed) for seed in range(7)]
    if not picture:
        talks = [[{"role": "user", "content": f"{i} tell me. " * 20}] for i in range(7)]
    sampling: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.5, "seed": 5}
    for talk in talks:
        alone.append(model.chat(talk, False, **sampling))
    lengths = [len(model.encode_chat(talk)[0]) for talk in talks]
    model.reset()
    rows.clear()
    page = PAGE * model._native.cell_bytes
    model._native.limit_cache((max(lengths) // PAGE + 2) * 2 * page)
    assert model.chat(talks, **sampling) == alone
    assert 1 < max(map(len, rows)) < 7
    assert_all_given_back(model)
    model._native.limit_cache((max(lengths) // PAGE + 2) * page)
    long = [{"role": "user", "content": "word " * 400}]
    assert model.chat(talks, **sampling) == alone
    raises(CacheFullError, "the KV cache is full", lambda: model.chat([*talks[:2], long], **sampling))
    assert_all_given_back(model)


def test_a_call_that_waits_for_room_begins_when_another_ends(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it had drawn or not, what it has given out stays; seeds too. However slow the readers are."""
    monkeypatch.setattr(scheduler, "_PATIENCE", 60.0)
    model = Qwen2VL.from_gguf(tiny_gguf, n_threads=1, n_ctx=256, precision="exact")

    def tokens(ids: list[int]) -> Iterator[int]:
        return model.generate(ids, max_new_tokens=90, temperature=2.0, seed=3, ignore_eos=True)

    prompts = [IDS[:60], IDS[30:80], IDS[::-1]]
    alone = [list(tokens(ids)) for ids in prompts]
    model.reset()
    model._native.limit_cache(4 * PAGE * model._native.cell_bytes)  # any of them needs three
    together: list[list[int]] = [[] for _ in prompts]

    def read(i: int) -> None:
        for token in tokens(prompts[i]):
            together[i].append(token)
            sleep(0.002 * i)

    in_threads([partial(read, i) for i in range(3)])
    assert together == alone
    assert_all_given_back(model)


# --- ends ---


def test_errors_reach_their_own_caller(tiny: Qwen2VL) -> None:
    """Also where another thread computes."""
    expected = list(tiny.generate(IDS, max_new_tokens=40, ignore_eos=True))
    caught: list[str] = []
    found: list[list[int]] = []

    def fail(stage: str, done: int, total: int) -> None:
        raise InterruptedError(f"{stage} {done} of {total}")

    def failing() -> None:
        with pytest.raises(InterruptedError, match="prefill") as error:
            list(tiny.generate(IDS[::-1], progress=fail))
        caught.append(str(error.value))

    def damaged() -> None:
        tokens = tiny.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True)
        found.append([len(list(tokens))])

    def good() -> None:
        found.append(list(tiny.generate(IDS, max_new_tokens=40, ignore_eos=True)))

    in_threads([good, failing, good, failing, damaged, failing])
    assert len(caught) == 3
    assert sorted(found, key=len) == [[5], expected, expected]
    assert_all_given_back(tiny)


def test_an_error_keeps_nothing(tiny: Qwen2VL) -> None:
    """What the frames hold through which it came is gone with them, without Python's collector."""

    def fail(stage: str, done: int, total: int) -> None:
        raise InterruptedError

    def call() -> None:
        left = tiny.generate(IDS, max_new_tokens=12, ignore_eos=True)
        next(left)
        with suppress(InterruptedError):
            list(tiny.generate(IDS[::-1], progress=fail))

    gc.collect()
    gc.disable()
    try:
        call()
        assert_all_given_back(tiny)
    finally:
        gc.enable()


def test_an_interrupted_step_goes_on(tiny: Qwen2VL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the call of its own thread, wherever the step was; the other calls miss nothing."""
    expected = list(tiny.generate(IDS, max_new_tokens=12, ignore_eos=True))
    for name in ("_admit", "_compute", "_draw"):
        tiny.reset()
        other = tiny.generate(IDS, max_new_tokens=12, ignore_eos=True)
        found = [next(other)]
        method = getattr(Scheduler, name)
        calls: list[int] = []

        def interrupted(*arguments: Any, method: Any = method, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            method(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(tiny.generate(IDS[:9], max_new_tokens=3))
            found += list(other)
        assert found == expected
        assert_all_given_back(tiny)


def test_closing_ends_every_call(tiny_gguf: Path) -> None:
    with Qwen2VL.from_gguf(tiny_gguf, n_threads=1) as model:
        tokens = model.generate(IDS, max_new_tokens=1000, ignore_eos=True)
        next(tokens)
        fresh = model.generate(IDS)
        closes = model.close
    for call in (
        lambda: list(tokens),
        lambda: next(fresh),
        lambda: model.generate(IDS),
        lambda: model.chat([{"role": "user", "content": "a"}]),
        lambda: model.weight_bytes,
    ):
        with pytest.raises(Qwen2VLError, match="this model has been closed"):
            call()
    closes()  # again
    assert model.tokenize("a") and repr(model) == "Qwen2VL(closed)"


def test_async_generate(tiny: Qwen2VL) -> None:
    expected = [list(tiny.generate(IDS[:n], max_new_tokens=9, ignore_eos=True)) for n in range(50, 60)]

    async def run() -> list[list[int]]:
        async def read(n: int) -> list[int]:
            return [token async for token in tiny.agenerate(IDS[:n], max_new_tokens=9, ignore_eos=True)]

        return list(await asyncio.gather(*(read(n) for n in range(50, 60))))

    tiny.reset()
    assert asyncio.run(run()) == expected
    with pytest.raises(ValueError, match="max_new_tokens"):
        tiny.agenerate(IDS, max_new_tokens=0)
    assert_all_given_back(tiny)
