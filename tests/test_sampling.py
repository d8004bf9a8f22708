"""How tokens are drawn: penalties, biases, stop strings, as `chat` and `generate` take them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from at_once import conversation
from conversations import conversation as prompt
from qwen2vl_q import Qwen2VL
from qwen2vl_q.text.text_stream import MAX_STOP_CHARS, MAX_STOPS
from test_constraints import Only

WHAT, COUNT = 0, 2  # seeds of at_once.conversation: what is in the picture, how many are there


def drawn_plainly(
    model: Qwen2VL, ids: list[int], n: int, presence: float, frequency: float, ngram: int
) -> list[int]:
    """Greedy tokens, each from the logits of everything before it, computed anew."""
    found: list[int] = []
    for _ in range(n):
        logits = model.logits(ids + found)[-1]
        for token, times in Counter(found).items():
            logits[token] -= np.float32(presence) + np.float32(frequency) * np.float32(times)
        whole = ids + found
        if ngram:
            for i in range(len(whole) - ngram + 1):
                if whole[i : i + ngram - 1] == whole[len(whole) - ngram + 1 :]:
                    logits[whole[i + ngram - 1]] = -np.inf
        found.append(int(logits.argmax()))
    return found


@pytest.mark.parametrize(
    ("presence", "frequency", "ngram"), [(0.5, 0, 0), (0, 0.25, 0), (-1, 0.5, 0), (0, 0, 2), (0.3, 0, 1)]
)
def test_penalties_look_at_what_was_drawn(
    tiny: Qwen2VL, presence: float, frequency: float, ngram: int
) -> None:
    ids = prompt(3, [24]).token_ids
    ids += ids[:12]
    options: Any = {
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "no_repeat_ngram_size": ngram,
    }
    found = list(tiny.generate(ids, max_new_tokens=24, ignore_eos=True, **options))
    assert found == drawn_plainly(tiny, ids, 24, presence, frequency, ngram)
    assert found != list(tiny.generate(ids, max_new_tokens=24, ignore_eos=True))


def test_no_pair_of_tokens_comes_twice(demo: Qwen2VL) -> None:
    ids, images = demo.encode_chat(conversation(WHAT))

    def repeated(**options: Any) -> int:
        said = ids + list(demo.generate(ids, images, max_new_tokens=100, ignore_eos=True, **options))
        pairs = Counter(zip(said[len(ids) - 1 :], said[len(ids) :], strict=False))
        return sum(times - 1 for times in pairs.values())

    assert repeated() > 0
    assert repeated(no_repeat_ngram_size=2) == 0
    assert repeated(no_repeat_ngram_size=2, temperature=1.5, seed=3) == 0


def test_a_bias_decides_an_answer(demo: Qwen2VL) -> None:
    talk = conversation(COUNT)
    answer = demo.chat(talk, False, temperature=0)
    [digit] = demo.tokenize(answer[0])
    for bias in (-100, -50.5):
        assert demo.chat(talk, False, temperature=0, logit_bias={digit: bias})[0] != answer[0]
    [other] = demo.tokenize("9")
    assert demo.chat(talk, False, temperature=0.7, seed=1, logit_bias={other: 100}, max_new_tokens=3) == "999"
    assert demo.chat(talk, False, temperature=0, logit_bias={}) == answer


def test_min_p_leaves_what_is_near_the_likeliest(demo: Qwen2VL) -> None:
    talk = conversation(WHAT)
    greedy = demo.chat(talk, False, temperature=0)
    hot: Any = {"temperature": 4.0, "max_new_tokens": 24}
    assert demo.chat(talk, False, min_p=0.999, seed=1, **hot) == greedy
    assert demo.chat(talk, False, seed=1, **hot) != greedy
    assert demo.chat(talk, False, seed=1, **hot) == demo.chat(talk, False, seed=1, **hot)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"presence_penalty": 2.1}, r"^presence_penalty: expected a number in \[-2, 2\], found 2.1"),
        ({"frequency_penalty": "1"}, r"^frequency_penalty: expected a number in \[-2, 2\], found 1"),
        ({"no_repeat_ngram_size": -1}, "^no_repeat_ngram_size: expected an integer of 0 to"),
        ({"logit_bias": [1]}, r"^logit_bias: expected {token id: bias}, found \[1\]"),
        ({"logit_bias": {"1": 1}}, "^logit_bias: token id: expected an integer of 0 to"),
        ({"logit_bias": {10**6: 1}}, "^logit_bias: token id: expected an integer of 0 to .*, found 1000000"),
        ({"logit_bias": {1: 101}}, "^logit_bias: token 1: expected -100 to 100, found 101"),
        ({"logit_bias": {1: float("nan")}}, "^logit_bias: token 1: expected -100 to 100, found nan"),
        ({"stop": ["a"] * (MAX_STOPS + 1)}, f"^stop: expected at most {MAX_STOPS} strings"),
        ({"stop": "a" * (MAX_STOP_CHARS + 1)}, f"^stop: expected .* found 1 of up to {MAX_STOP_CHARS + 1}"),
    ],
)
def test_what_is_out_of_range(tiny: Qwen2VL, options: dict[str, Any], match: str) -> None:
    for call in (tiny.generate, lambda _, **o: tiny.chat([{"role": "user", "content": "a"}], **o)):
        with pytest.raises(ValueError, match=match):
            call([1], **options)


def test_nothing_of_a_stop_string_is_shown(demo: Qwen2VL) -> None:
    """Of several the one that comes first, whichever tokens it is spread over."""
    talk = conversation(WHAT)
    answer = demo.chat(talk, False, temperature=0)
    assert len(answer) > 20
    for first in range(1, len(answer) - 4):
        stop = [answer[first : first + 5], answer[first + 2 : first + 4] + "?", "nothing"]
        expected = answer[: answer.index(stop[0])]
        pieces = list(demo.chat(talk, temperature=0, stop=stop))
        assert "".join(pieces) == expected
        assert demo.last_stats.finish_reason == "stop"
    assert demo.chat(talk, False, temperature=0, stop=answer[-3:] + "never") == answer
    assert demo.chat(talk, False, temperature=0, stop=None) == answer


def test_special_tokens_are_shown_where_asked_for(demo: Qwen2VL) -> None:
    talk = conversation(WHAT)
    tokens = [demo.tokenizer.special_tokens["<|vision_start|>"]]

    def answer(**options: Any) -> str:
        found: str = demo.chat(talk, False, temperature=0, constraint=Only(demo, tokens, 2), **options)
        return found

    assert answer() == answer(skip_special_tokens=True) == ""
    assert answer(skip_special_tokens=False) == "<|vision_start|>" * 2  # what ends it is not shown
    assert answer(skip_special_tokens=False, stop="start|><") == "<|vision_"
