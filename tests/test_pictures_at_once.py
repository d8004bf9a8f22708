"""Pictures between the tokens of other calls: in slices, each once."""

from __future__ import annotations

import gc
from threading import Event, Thread
from typing import Any

import pytest

from at_once import (
    IDS,
    SEED,
    Messages,
    assert_all_given_back,
    seeing,
)
from demo import cases
from qwen2vl_q import Qwen2VL, Qwen2VLError, _native
from qwen2vl_q.engine.pictures import Encoding
from qwen2vl_q.engine.request import Request
from qwen2vl_q.text.text_stream import TextStream


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
    demo: Qwen2VL, slices: list[bytes], rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step between two slices, though another thread reads without a pause."""
    steps: list[int] = []  # taken before each slice
    advance = Encoding.advance

    def noting(self: Encoding, *arguments: Any) -> bool:
        steps.append(len(rows))
        return advance(self, *arguments)

    picture = demo.load_image(cases.case("what", SEED).images[0])  # which takes no turn
    demo.encode_image(picture)
    demo.reset()
    stream = demo.generate(IDS, max_new_tokens=3000, ignore_eos=True)
    next(stream)
    encoded = Event()
    reader = Thread(target=lambda: [next(stream) for _ in iter(encoded.is_set, True)])
    reader.start()
    monkeypatch.setattr(Encoding, "advance", noting)
    demo.encode_image(picture)
    encoded.set()
    reader.join()
    assert len(steps) > 10
    assert steps[-1] - steps[0] <= 2 * len(steps)


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
        [answer] = demo._calls.answers([talk], 1, False, {"max_new_tokens": 9, "temperature": 0})
        return answer._request

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
        assert demo._generation.answer(second, demo.tokenizer).complete().text == expected[1]
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
