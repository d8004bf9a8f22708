"""Tokens that are computed before they are drawn: the same answers in fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from at_once import IDS, PAGE, assert_all_given_back, conversation, in_threads
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.cli.conversation import describe_stats
from qwen2vl_q.engine.guessing import Guessing
from qwen2vl_q.engine.scheduler import Scheduler
from qwen2vl_q.engine.stats import GenerationStats

VOCABULARY = 300  # of what is drawn freely


class Says:
    """A constraint: these tokens, whose next ones it may tell."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, told: Sequence[int] | None = None) -> None:
        self.tokens, self.told, self.at, self.vocab_size = list(tokens), told, 0, vocab_size

    def allowed(self) -> NDArray[np.uint8]:
        mask = np.zeros(self.vocab_size, np.uint8)
        mask[self.tokens[self.at]] = 1
        return mask

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.at]
        self.at += 1

    def forced(self) -> Sequence[int]:
        return self.tokens[self.at :] if self.told is None else self.told


def says(tiny: Qwen2VL, tokens: Sequence[int], told: Sequence[int] | None = None) -> Says:
    return Says(tokens, tiny.config.vocab_size, told)


def drawn(model: Qwen2VL, ids: list[int], n: int, **options: Any) -> list[int]:
    return list(model.generate(ids, max_new_tokens=n, ignore_eos=True, **options))


# --- how much ---


def test_right_guesses_make_longer_ones() -> None:
    guessing = Guessing(8)
    lengths = []
    for _ in range(4):
        lengths.append(guessing.length)
        guessing.make(guessing.length)
        guessing.learn(guessing.length)
    assert lengths == [3, 6, 8, 8]
    guessing.make(8)
    guessing.learn(3)
    assert guessing.length == 3
    assert (guessing.guessed, guessing.confirmed) == (3 + 6 + 8 + 8 + 8, 3 + 6 + 8 + 8 + 3)


def test_wrong_guesses_make_pauses() -> None:
    guessing = Guessing(8)
    made = []
    for _ in range(200):
        made.append(guessing.length)
        guessing.make(guessing.length)
        guessing.learn(0)
    at = [i for i, length in enumerate(made) if length]
    pauses = [after - before - 1 for before, after in pairwise(at)]
    assert pauses == [1, 2, 4, 8, 16, 32, 32, 32, 32]
    guessing = Guessing(0)
    assert guessing.length == 0


def test_what_followed_before_is_likely(tiny: Qwen2VL) -> None:
    def looked_up(ids: list[int], most: int) -> list[int]:
        state = _native.SequenceState(tiny._native, 256)
        state.begin(_native.Prompt(tiny._native, ids), [])
        return state.look_up(most)

    assert looked_up([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == [4, 5, 9]
    assert looked_up([1, 2, 3, 4, 7, 1, 2, 3, 5, 8, 1, 2, 3], 2) == [5, 8]  # the latest place
    assert looked_up([6, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert looked_up([4, 4, 4, 4], 3) == [4, 4, 4]
    assert looked_up([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1) == [4]  # three tell more than two
    assert looked_up([9, 2, 3, 5, 1, 2, 3], 3) == [5, 1, 2]
    for ids, most in (
        ([1, 2, 3, 4, 1, 3], 3),
        ([1, 2, 3], 3),
        ([2, 2], 3),
        ([5], 3),
        ([1, 2, 3, 1, 2, 3], 0),
    ):
        assert looked_up(ids, most) == []


# --- the same answers ---


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.3, "seed": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 5},
        {"temperature": 0.4, "seed": 1, "presence_penalty": 0.7, "logit_bias": {7: 3.0}},
    ],
)
def test_answers_are_the_same(tiny: Qwen2VL, rows: list[list[int]], sampling: dict[str, Any]) -> None:
    few = dict.fromkeys(range(6), 100.0)  # so that it repeats itself
    sampling = {**sampling, "logit_bias": {**few, **sampling.get("logit_bias", {})}}
    for ids in (IDS, IDS[:7] * 9, [5] * 40):
        rows.clear()
        plain = drawn(tiny, ids, 150, prompt_lookup_num_tokens=0, **sampling)
        stats = tiny.last_stats
        assert len(rows) == 150 and stats.guessed_tokens == stats.confirmed_tokens == 0
        rows.clear()
        assert drawn(tiny, ids, 150, **sampling) == plain
        stats = tiny.last_stats
        assert 0 < stats.confirmed_tokens <= stats.guessed_tokens
        assert len(rows) == 150 - stats.confirmed_tokens
        assert stats.generated_tokens == 150
        assert_all_given_back(tiny)


def test_log_probabilities_are_the_same(demo: Qwen2VL) -> None:
    found = []
    for n in (0, 8):
        answer = demo.chat(
            conversation(1), False, details=True, logprobs=True, top_logprobs=3, max_new_tokens=40,
            temperature=0, prompt_lookup_num_tokens=n, logit_bias=dict.fromkeys(range(40, 44), 100.0),
        )  # fmt: skip
        found.append(answer.logprobs)
        confirmed = demo.last_stats.confirmed_tokens
        demo.reset()
    assert found[0] == found[1] and confirmed > 5


def test_ends_and_limits_end_a_guess(tiny: Qwen2VL) -> None:
    text = list(range(40, 60)) * 3
    for n in (1, 2, 3, 20, 21, 59):
        assert drawn(tiny, IDS, n, constraint=says(tiny, text)) == text[:n]
        assert tiny.last_stats.generated_tokens == n and tiny.last_stats.finish_reason == "length"
    eos = tiny.config.eos_token_ids[0]
    ended = list(tiny.generate(IDS, max_new_tokens=50, constraint=says(tiny, [40, 41, 42, eos, 43, 44])))
    assert ended[:3] == [40, 41, 42] and len(ended) <= 4 and tiny.last_stats.finish_reason == "stop"
    piece = tiny.detokenize(text[10:12])
    stopped = list(tiny.generate(IDS, max_new_tokens=50, constraint=says(tiny, text), stop=piece))
    assert text[:10] == stopped[:10] and len(stopped) <= 12 and tiny.last_stats.finish_reason == "stop"
    assert_all_given_back(tiny)
    state = _native.SequenceState(tiny._native, 256)  # nothing of a guess that did not count stays
    assert state.adopt(_native.Prompt(tiny._native, [*IDS, 40, 41, 42, eos, 43, 44])) == len(IDS) + 3


def test_what_a_constraint_forces_is_computed_at_once(tiny: Qwen2VL, rows: list[list[int]]) -> None:
    text = np.random.default_rng(1).integers(0, VOCABULARY, 60).tolist()
    assert drawn(tiny, IDS, 60, constraint=says(tiny, text)) == text
    assert len(rows) <= 12
    rows.clear()
    wrong = [(token + 1) % VOCABULARY for token in text]
    assert drawn(tiny, IDS, 60, constraint=says(tiny, text, told=wrong)) == text
    assert len(rows) >= 55
    rows.clear()
    assert drawn(tiny, IDS, 60, constraint=says(tiny, text), prompt_lookup_num_tokens=0) == text
    assert len(rows) == 60


@pytest.mark.parametrize("told", [[10**6], [-1], "no tokens", None])
def test_a_constraint_that_tells_nonsense_fails_alone(tiny: Qwen2VL, told: Any) -> None:
    class Nonsense(Says):
        def forced(self) -> Any:
            if told is None:
                raise ZeroDivisionError
            return told

    other = tiny.generate(IDS, max_new_tokens=9, ignore_eos=True)
    found = [next(other)]
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
        drawn(tiny, IDS, 9, constraint=Nonsense([4] * 9, tiny.config.vocab_size))
    found += list(other)
    assert found == drawn(tiny, IDS, 9)
    assert_all_given_back(tiny)


def test_many_at_once_guess_as_one(demo: Qwen2VL) -> None:
    few = dict.fromkeys(range(40, 46), 100.0)
    options: dict[str, Any] = {"max_new_tokens": 50, "logit_bias": few, "ignore_eos": True}
    options["temperature"] = 0.5
    prompts = [[(seed * 7 + i) % 90 + 10 for i in range(30 + 9 * seed)] for seed in range(20)]
    alone = [
        list(demo.generate(ids, seed=seed, prompt_lookup_num_tokens=0, **options))
        for seed, ids in enumerate(prompts)
    ]
    for n in (2, 5, 20):
        demo.reset()
        found: dict[int, list[int]] = {}

        def read(i: int, found: dict[int, list[int]] = found) -> None:
            found[i] = list(demo.generate(prompts[i], seed=i, **options))

        in_threads([lambda i=i: read(i) for i in range(n)])  # type: ignore[misc]
        assert [found[i] for i in range(n)] == alone[:n]
    assert_all_given_back(demo)


def test_an_answer_that_begins_anew_computes_its_tokens_together(
    tiny: Qwen2VL, rows: list[list[int]]
) -> None:
    text = np.random.default_rng(2).integers(0, VOCABULARY, 80).tolist()
    stream = tiny.generate(IDS, max_new_tokens=80, constraint=says(tiny, text, told=()), ignore_eos=True)
    found = [next(stream) for _ in range(40)]
    scheduler: Scheduler = tiny._generation.scheduler
    [request] = scheduler._running
    scheduler._waiting.append(request)  # as where a full cache makes it wait
    scheduler._running.remove(request)
    request.restart()
    tiny._native.forget()
    rows.clear()
    found += list(stream)
    assert found == text
    assert len(rows) <= 1 + 40 / 8 + 40


def test_stats_tell_what_was_guessed() -> None:
    stats = GenerationStats(generated_tokens=9, guessed_tokens=7, confirmed_tokens=4, decode_seconds=2)
    assert "answer 9 tokens (4 guessed) in 2.00 s (4.0 tok/s)" in describe_stats(stats)
    assert "answer 9 tokens in" in describe_stats(replace(stats, confirmed_tokens=0))


# --- what cannot be guessed ---


def test_guesses_are_checked(tiny: Qwen2VL) -> None:
    state = _native.SequenceState(tiny._native, PAGE + 4)
    prompt = _native.Prompt(tiny._native, IDS[: PAGE - 6])
    with pytest.raises(ValueError, match="guess: expected a drawn token that waits"):
        state.guess([1])
    state.begin(prompt, [])
    with pytest.raises(ValueError, match="guess: expected a drawn token that waits"):
        state.guess([1])
    _native.step([state], [len(prompt)])
    with pytest.raises(ValueError, match="guess: expected a drawn token that waits"):
        state.guess([1])
    state.push(4)
    with pytest.raises(ValueError, match=f"expected an id below {tiny.config.vocab_size}, found -1"):
        state.guess([5, -1])
    assert state.guess([5] * 9) == 5  # to the end of the page
    assert state.guess([6, 7]) == 2 and state.waiting == 1
    _native.step([state], [1])
    assert state.n_cells == PAGE - 5 and state.waiting == 0
    with pytest.raises(ValueError, match="guess: expected a drawn token that waits"):
        state.guess([1])
    state.push(6)
    assert state.n_cells == PAGE - 4 and state.waiting == 0
    state.push(8)  # not 7
    assert state.n_cells == PAGE - 4 and state.waiting == 1
    for token in range(4):
        _native.step([state], [1])
        state.push(token)
    assert state.n_cells == PAGE and state.guess([1] * 9) == 3  # to the end of the context


@pytest.mark.parametrize("value", [-1, 33, 1.5, "8", True])
def test_the_option_is_checked(tiny: Qwen2VL, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="prompt_lookup_num_tokens: expected"):
        tiny.generate(IDS, prompt_lookup_num_tokens=value)


def test_none_is_as_not_said(tiny: Qwen2VL) -> None:
    drawn(tiny, [5] * 40, 30, prompt_lookup_num_tokens=None, logit_bias={5: 100.0})
    assert tiny.last_stats.confirmed_tokens > 15
