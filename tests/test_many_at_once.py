"""Many calls at once on one instance: threads and asyncio, abandoned, cancelled and failing ones."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread
from time import sleep
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from demo import cases
from qwen2vl_q import DEMO_MODEL, CacheFullError, Qwen2VL, Qwen2VLError, _native
from qwen2vl_q.engine import scheduler
from qwen2vl_q.engine.pictures import Encoding
from qwen2vl_q.engine.request import Request
from qwen2vl_q.engine.scheduler import Scheduler
from qwen2vl_q.text.text_stream import TextStream

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


@pytest.fixture
def demo() -> Qwen2VL:
    return Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2)


def assert_all_given_back(model: Qwen2VL) -> None:
    assert not model._generation.scheduler._running and not model._generation.scheduler._waiting
    native = model._native
    assert native.idle_pages * PAGE * native.cell_bytes == native.cache_bytes


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every step that is taken from here on."""
    taken: list[list[int]] = []
    step = _native.step

    def counting(states: Any, rows: Any, progress: Any = None) -> None:
        try:
            step(states, rows, progress)
        finally:
            del states  # an error's traceback would keep them
        taken.append(list(rows))

    monkeypatch.setattr(_native, "step", counting)
    return taken


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
    assert max(map(len, rows)) > 8  # they did share steps
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


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The key of the picture of every slice from here on; slices are as small as they can be."""
    taken: list[bytes] = []
    advance = Encoding.advance

    def counting(self: Encoding, seconds: float, report: Any) -> bool:
        taken.append(self._image.key)
        return advance(self, 0, report)

    monkeypatch.setattr(Encoding, "advance", counting)
    return taken


def seeing(picture: Any, text: str = "What is it?") -> Messages:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def test_streams_go_on_while_a_picture_is_encoded(demo: Qwen2VL, slices: list[bytes]) -> None:
    """A token after every slice, for whoever reads; the same answers as alone."""
    picture = cases.case("what", SEED).images[0]
    demo.encode_image(picture)  # the tower is there now
    demo.reset()
    slices.clear()
    talk = seeing(picture)
    answer = demo.chat(talk, False, max_new_tokens=9, temperature=0)
    n = len(slices)
    assert n > 10
    generation = demo._generation

    def ask() -> None:
        assert demo.chat(talk, False, max_new_tokens=9, temperature=0) == answer

    for call in (ask, lambda: demo.encode_image(picture)):
        demo.reset()
        expected = list(demo.generate(IDS, max_new_tokens=n + 20, ignore_eos=True))
        demo.reset()
        slices.clear()
        stream = generation.request(
            generation.prepare(IDS, []), _native.Sampler(), n + 20, TextStream(demo.tokenizer), None
        )
        stream.ahead = stream.limit
        generation.scheduler.submit(stream)
        call()
        assert len(slices) == n
        assert stream.drawn >= n - 1
        assert list(generation.tokens(stream)) == expected
        assert_all_given_back(demo)


def test_a_stream_takes_no_turns_from_a_picture(
    demo: Qwen2VL, slices: list[bytes], rows: list[list[int]]
) -> None:
    """One step between two slices, though another thread reads without a pause."""
    picture = cases.case("what", SEED).images[0]
    demo.encode_image(picture)
    demo.reset()
    stream = demo.generate(IDS, max_new_tokens=3000, ignore_eos=True)
    next(stream)
    encoded = Event()
    reader = Thread(target=lambda: [next(stream) for _ in iter(encoded.is_set, True)])
    reader.start()
    slices.clear()
    rows.clear()
    demo.encode_image(picture)
    steps = len(rows)
    encoded.set()
    reader.join()
    assert len(slices) > 10
    assert steps <= 2 * len(slices)


def test_two_who_want_one_picture_encode_it_once(
    demo: Qwen2VL, slices: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; and where the first goes away in the middle: with an error of its callback, closed, or with
    Ctrl-C. Without others its work is dropped."""
    picture = cases.case("what", SEED).images[0]
    talks = [seeing(picture), [{"role": "system", "content": "Other."}, *seeing(picture, "How many?")]]
    demo.encode_image(picture)  # the tower is there now
    demo.reset()
    slices.clear()
    expected = [demo.chat(talk, False, max_new_tokens=9, temperature=0) for talk in talks]
    pieces = len(slices)
    demo.reset()
    slices.clear()
    assert demo.chat(talks, max_new_tokens=9, temperature=0) == expected
    assert len(slices) == pieces
    steps = demo._generation.scheduler

    def request(talk: Messages) -> Request:
        return demo._chat_request(talk, {"max_new_tokens": 9, "temperature": 0})

    def run_for(request: Request, n: int) -> None:
        slices.clear()
        while len(slices) < n:
            with steps.turn():
                steps._step()

    def interrupt(first: Request) -> None:
        def raising(*arguments: Any) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Encoding, "advance", raising)
            with pytest.raises(KeyboardInterrupt):
                steps.next(first)

    def fail(first: Request) -> None:
        def progress(*arguments: Any) -> None:
            raise InterruptedError

        first.progress = progress
        with monkeypatch.context() as patch:
            patch.setattr(
                Encoding,
                "advance",
                lambda self, seconds, report: report(0, 2),  # as a slow slice does
            )
            with pytest.raises(InterruptedError):
                steps.next(first)

    for leave in (interrupt, fail, steps.close):
        demo.reset()
        first, second = map(request, talks)
        for r in (first, second):
            steps.submit(r)
        run_for(first, pieces // 2)
        leave(first)
        steps.close(first)
        assert "".join(demo._generation.texts(second)) == expected[1]
        assert len(slices) == pieces
        assert second.image_tokens and not first.image_tokens
        demo.reset()
        alone = request(talks[0])
        steps.submit(alone)
        run_for(alone, pieces // 2)
        leave(alone)
        steps.close(alone)
        alone.error = None  # its traceback
        gc.collect()
        assert not steps._pictures._under_way
        assert_all_given_back(demo)
    demo.reset()
    slices.clear()
    begun = request(talks[0])
    steps.submit(begun)
    run_for(begun, 3)
    demo.close()
    with pytest.raises(Qwen2VLError, match="closed"):
        steps.next(begun)


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
    idle = tiny.generate(IDS, max_new_tokens=1000, ignore_eos=True)
    expected = [next(idle)]
    list(tiny.generate(IDS[:50], max_new_tokens=60, ignore_eos=True))
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


# --- constraints ---


def beside(*calls: Callable[[], Any]) -> list[Any]:
    """What calls give that are made at once."""
    found: list[Any] = [None] * len(calls)

    def keep(i: int) -> None:
        found[i] = calls[i]()

    in_threads([partial(keep, i) for i in range(len(calls))])
    return found


class Only:
    """Some tokens; the rest of an answer is for the end once so many have been drawn."""

    def __init__(self, model: Qwen2VL, tokens: list[int], n: int, dtype: type = np.uint8) -> None:
        self.masks: NDArray[Any] = np.zeros((2, model.config.vocab_size), dtype)
        self.masks[0, tokens] = 1
        self.masks[1, list(model.config.eos_token_ids)] = 1
        self.n = n
        self.accepted: list[int] = []

    def allowed(self) -> Any:
        return self.masks[int(len(self.accepted) >= self.n)]

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_an_answer_of_some_tokens(demo: Qwen2VL) -> None:
    """Those likeliest, beside calls that may say anything."""
    talk = conversation(2)  # how many
    ask = partial(demo.chat, talk, False, max_new_tokens=24, temperature=0)
    free = ask()
    digits = {token: str(d) for d in range(10) for token in demo.tokenize(str(d))}
    for temperature in (0, 2.0):
        for dtype in (np.uint8, np.bool_):
            constraint = Only(demo, list(digits), 3, dtype)
            answer, other = beside(partial(ask, constraint=constraint, temperature=temperature), ask)
            assert other == free
            *said, end = constraint.accepted
            assert end in demo.config.eos_token_ids
            assert "".join(digits[token] for token in said) == answer and len(said) == 3
    ids, images = demo.encode_chat(talk)
    first = demo.logits(ids, images)[-1]
    best = max(digits, key=lambda token: float(first[token]))
    assert next(demo.generate(ids, images, constraint=Only(demo, list(digits), 3))) == best


def test_what_a_constraint_raises_ends_its_own_call(demo: Qwen2VL) -> None:
    talk = conversation(1)
    ask = partial(demo.chat, talk, False, max_new_tokens=24, temperature=0)
    expected = ask()
    n = demo.config.vocab_size

    class Wrong(Only):
        def __init__(self, mask: Any) -> None:
            super().__init__(demo, [], 0)
            self.mask = mask

        def allowed(self) -> Any:
            if isinstance(self.mask, Exception):
                raise self.mask
            return self.mask

    class Calling(Only):
        def accept(self, token: int) -> None:
            demo.chat(talk, False)

    for constraint, kind, message in (
        (Wrong(LookupError("no rule")), LookupError, "no rule"),
        (Wrong(np.zeros(n, np.uint8)), ValueError, "allowed: expected a token that may be drawn, found none"),
        (Wrong(np.ones(n - 1, bool)), ValueError, rf"expected bool or uint8 \[{n}\], found bool \[{n - 1}\]"),
        (Wrong(np.ones((1, n), bool)), ValueError, rf"expected bool or uint8 \[{n}\], found bool \[1, {n}\]"),
        (Wrong(np.ones(n, np.int8)), ValueError, rf"found int8 \[{n}\]"),
        (Calling(demo, [5], 9), Qwen2VLError, "a call of the model is under way in this thread"),
    ):
        fails = partial(raises, kind, message, partial(ask, constraint=constraint))
        assert beside(fails, ask, fails)[1] == expected
        assert_all_given_back(demo)
    no_limit = Wrong(None)
    assert ask(constraint=no_limit) == expected
    assert no_limit.accepted
    with pytest.raises(ValueError, match=r"expected an object with allowed\(\) and accept\(\), found 5"):
        demo.generate([1], constraint=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="constraint: expected one conversation, found a list"):
        demo.chat([talk, talk], constraint=no_limit)


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
