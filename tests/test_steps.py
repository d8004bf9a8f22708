"""Steps of many sequences, pages that they share, and pictures between them."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Literal

import numpy as np
import pytest

from pictures import picture
from qwen2vl_q import DEMO_MODEL, CacheFullError, Qwen2VL, _native
from test_sequences import assert_same, random_ids, random_prompt, sequence

PAGE = 64  # cells


def text(m: Qwen2VL, seed: int, n: int) -> _native.Prompt:
    return _native.Prompt(m._native, np.array(random_ids(np.random.default_rng(seed), n), np.int32))


def test_prompts_in_chunks_and_tokens_share_a_step(tiny: Qwen2VL) -> None:
    """Whatever stands beside them, and wherever a prompt or its picture is cut."""
    prompt, embeddings = random_prompt(tiny, 1, 70, (1, 12, 20), 9)
    short = text(tiny, 2, 5)
    expected, decoded = sequence(tiny, prompt, [embeddings]), sequence(tiny, short, [])
    long, other = (_native.SequenceState(tiny._native, 512) for _ in range(2))
    long.begin(prompt, [embeddings])
    del embeddings  # the sequence keeps them as long as they are needed
    other.prefill(short, [])
    tokens = [3, 1, 4, 1, 5]
    for token, rows in zip(tokens, (50, 40, 30, 18, 1), strict=True):
        decoded.accept(token)
        other.push(token)
        with pytest.raises(ValueError, match="the last prefill was not finished"):
            long.push(token)
        _native.step([long, other], [rows, 1])
        assert_same(other.logits, decoded.logits)
    assert (long.waiting, long.n_cells) == (0, len(prompt))
    assert_same(long.logits, expected.logits)


def test_what_a_sequence_has_computed_is_found_by_others(tiny: Qwen2VL) -> None:
    prompt, embeddings = random_prompt(tiny, 3, 70, (1, 8, 12), 20)
    first = sequence(tiny, prompt, [embeddings])
    bytes_of_first = tiny._native.cache_bytes
    second = _native.SequenceState(tiny._native, 512)
    assert second.adopt(prompt) == len(prompt) - 1
    assert tiny._native.cache_bytes == bytes_of_first  # until it writes to the last page
    second.begin(prompt, [None])
    _native.step([second], [1])
    assert tiny._native.cache_bytes == bytes_of_first + first.kv_bytes // 2
    assert_same(second.logits, first.logits)
    for state in (first, second):
        state.accept(7)
    assert_same(second.logits, first.logits)
    other, _ = random_prompt(tiny, 3, 70, (1, 12, 8), 20)  # the same tokens for another grid
    assert second.adopt(other) == 70
    del first, second, state
    assert tiny._native.idle_pages == 3
    third = _native.SequenceState(tiny._native, 512)
    assert third.adopt(prompt) == len(prompt) - 1
    tiny._native.forget()
    assert third.adopt(prompt) == 0 and third.n_cells == 0


def test_a_full_cache_leaves_the_others_as_they_are(tiny: Qwen2VL) -> None:
    tiny._native.limit_cache(3 * PAGE * tiny._native.cell_bytes)
    a, b = sequence(tiny, text(tiny, 1, PAGE), []), sequence(tiny, text(tiny, 2, PAGE), [])
    for state in (a, b):
        state.push(5)
    with pytest.raises(CacheFullError, match=r"the KV cache is full: expected .* bytes"):
        _native.step([a, b], [1, 1])
    assert [(state.n_cells, state.waiting) for state in (a, b)] == [(PAGE, 1)] * 2
    _native.step([a], [1])
    del a
    _native.step([b], [1])
    assert b.n_cells == PAGE + 1


def test_a_cancelled_step_can_be_taken_again(tiny: Qwen2VL) -> None:
    def stop(done: int, total: int) -> None:
        raise InterruptedError

    prompt, embeddings = random_prompt(tiny, 4, 30, (1, 8, 12), 20)
    state = _native.SequenceState(tiny._native, 512)
    state.begin(prompt, [embeddings])
    with pytest.raises(InterruptedError):
        _native.step([state], [state.waiting], stop)
    assert (state.n_cells, state.waiting) == (0, len(prompt))
    _native.step([state], [state.waiting])
    assert_same(state.logits, sequence(tiny, prompt, [embeddings]).logits)
    for rows, message in ((0, "expected 1 to 0 rows"), (1, "expected 1 to 0 rows")):
        with pytest.raises(ValueError, match=message):
            _native.step([state], [rows])
    with pytest.raises(ValueError, match="rows for each of 1 sequences, found 0"):
        _native.step([state], [])


def test_threads_take_steps_of_their_own(tiny: Qwen2VL) -> None:
    """Sequences, and what may be asked of the model meanwhile, without a scheduler above them."""

    def tokens(seed: int) -> list[int]:
        state, greedy, drawn = sequence(tiny, text(tiny, seed, 70), []), _native.Sampler(), []
        for _ in range(8):
            drawn.append(state.sample(greedy))
            state.accept(drawn[-1])
        return drawn

    expected = [tokens(seed) for seed in range(4)]
    native = tiny._native
    found: dict[int, list[int]] = {}
    threads = [Thread(target=lambda i: found.update({i: tokens(i)}), args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        native.forget()
        assert native.idle_pages >= 0 and native.cache_bytes >= 0 and native.weight_bytes > 0
    assert [found[seed] for seed in range(4)] == expected
    native.forget()
    assert (native.idle_pages, native.cache_bytes) == (0, 0)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("isa", _native.supported_isas())
def test_a_picture_may_be_left_anywhere(
    isa: str, precision: Literal["fast", "exact"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another one, prompts and tokens may come between, from the first piece on."""
    monkeypatch.setenv("QWEN2VL_ISA", isa)
    pictures = [picture(420, 560, 1), picture(84, 1120, 2)]  # of more rows than go through a layer together

    def passes(m: Qwen2VL) -> list[_native.VisionPass]:
        levels = m.image_processor.levels()
        images = [m.load_image(image) for image in pictures]
        return [_native.VisionPass.of_pixels(m._native, i.pixels, levels, i.grid_thw) for i in images]

    def load() -> Qwen2VL:
        return Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2, precision=precision)

    whole = [run.advance() for run in passes(load())]
    model = load()
    stream = sequence(model, text(model, 1, 9), [])
    expected = stream.logits
    left = dict(enumerate(passes(model)))
    found: dict[int, _native.Embeddings] = {}
    pieces = 0
    while left:
        for i, run in list(left.items()):
            if (rows := run.advance(0)) is not None:
                found[i] = rows
                del left[i]
        pieces += 1
        if pieces % 4 == 0:
            np.testing.assert_array_equal(sequence(model, text(model, 1, 9), []).logits, expected)
            stream.accept(5)
    assert pieces > 20
    for i, rows in enumerate(whole):
        assert rows is not None
        np.testing.assert_array_equal(found[i].numpy(), rows.numpy())
    with pytest.raises(ValueError, match="read-only"):
        found[0].numpy()[0] = 0


def test_a_pass_that_a_callback_stops_goes_on(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_ISA", "generic")  # slow: the callback is asked at most every 50 ms
    model = Qwen2VL.from_gguf(tiny_gguf, n_threads=1, precision="exact")
    image = model.load_image(picture(980, 980))
    run, other = (
        _native.VisionPass.of_pixels(
            model._native, image.pixels, model.image_processor.levels(), image.grid_thw
        )
        for _ in range(2)
    )
    stops: list[int] = []

    def stop(done: int, total: int) -> None:
        stops.append(done)
        raise InterruptedError

    rows = None
    while rows is None:
        try:
            rows = run.advance(progress=None if len(stops) == 3 else stop)
        except InterruptedError:
            continue
    expected = other.advance()
    assert stops and expected is not None
    np.testing.assert_array_equal(rows.numpy(), expected.numpy())
    assert run.advance() is rows


def test_only_allowed_tokens_are_drawn(tiny: Qwen2VL) -> None:
    state = sequence(tiny, text(tiny, 5, 20), [])
    allowed = np.zeros(tiny.config.vocab_size, bool)
    some = np.array([4, 99, 700])
    allowed[some] = True
    best = int(some[state.logits[some].argmax()])
    assert state.sample(_native.Sampler(), allowed) == best
    hot = _native.Sampler(temperature=1e3, seed=1)
    assert {state.sample(hot, allowed) for _ in range(50)} == set(some.tolist())
    assert state.sample(_native.Sampler(), allowed.astype(np.uint8)) == best
    punished = _native.Sampler(repetition_penalty=1.5)
    assert state.sample(punished, allowed) in some
    with pytest.raises(ValueError, match=r"allowed: expected bool or uint8 \[1040\], found bool \[1039\]"):
        state.sample(hot, allowed[:-1])
    with pytest.raises(ValueError, match="allowed: expected a token that may be drawn, found none"):
        state.sample(hot, np.zeros_like(allowed))


def test_log_probabilities_are_the_model_s_own(tiny: Qwen2VL) -> None:
    """Of the logits: neither penalties nor masks change them."""
    state = sequence(tiny, text(tiny, 5, 30), [])
    with pytest.raises(ValueError, match="log_probabilities: nothing has been evaluated yet"):
        _native.SequenceState(tiny._native, 8).log_probabilities(1)
    logits = state.logits.astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    state.sample(_native.Sampler(repetition_penalty=9.0, logit_bias={3: 50}))
    found, top = state.log_probabilities(3, 5)
    assert found == pytest.approx(expected[3], abs=1e-9)
    assert [token for token, _ in top] == np.argsort(-logits, kind="stable")[:5].tolist()
    assert [value for _, value in top] == pytest.approx(np.sort(expected)[::-1][:5].tolist(), abs=1e-9)
    assert state.log_probabilities(3) == (found, [])
    for token in (-1, tiny.config.vocab_size):
        with pytest.raises(ValueError, match=r"^token: expected .* found "):
            state.log_probabilities(token)
