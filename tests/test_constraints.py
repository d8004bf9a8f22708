"""What a caller allows to be said, token by token."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from at_once import (
    assert_all_given_back,
    beside,
    conversation,
    raises,
)
from qwen2vl_q import Qwen2VL, Qwen2VLError


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
