"""What is told of an answer beside its text: parts, log-probabilities, why it ended, what it took."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest

from at_once import assert_all_given_back, conversation
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.engine.answer import Answer

WHAT, READ, COUNT, BOX = 0, 1, 2, 3  # seeds of at_once.conversation
GREEDY: Any = {"temperature": 0, "max_new_tokens": 40}


def test_parts_make_the_answer_that_chat_gives(demo: Qwen2VL) -> None:
    talk = conversation(WHAT)
    expected = demo.chat(talk, False, **GREEDY)
    answer = demo.chat(talk, details=True, **GREEDY)
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("", "", None)
    first = next(answer)
    assert first.text == answer.text and expected.startswith(first.text)
    assert answer.finish_reason == ""
    assert first.text + "".join(part.text for part in answer) == answer.text == expected
    assert answer.finish_reason == answer.stats.finish_reason == "stop"
    assert list(answer) == []
    assert answer.message == {"role": "assistant", "content": expected}
    whole = demo.chat(talk, False, details=True, **GREEDY)
    assert repr(whole) == f"Answer({expected!r}, finish_reason='stop')"
    assert_all_given_back(demo)


def test_usage(demo: Qwen2VL) -> None:
    talk = conversation(WHAT)
    ids, _ = demo.encode_chat(talk)
    pads = sum(token == demo.config.image_token_id for token in ids)
    first, second = (demo.chat(talk, False, details=True, **GREEDY).stats for _ in range(2))
    assert (first.prompt_tokens, first.prompt_image_tokens) == (len(ids), pads)
    assert (first.image_tokens, second.image_tokens, second.prompt_image_tokens) == (pads, 0, pads)
    assert (first.reused_tokens, second.reused_tokens) == (0, len(ids) - 1)
    assert min(first.encode_seconds, first.prefill_seconds, first.decode_seconds) > 0
    assert second.encode_seconds == 0
    cut = demo.chat(talk, False, details=True, temperature=0, max_new_tokens=2)
    assert (cut.finish_reason, cut.stats.generated_tokens) == ("length", 2)
    full = Qwen2VL.from_gguf(DEMO_MODEL, n_threads=1, n_ctx=len(ids) + 1)
    assert full.chat(talk, False, details=True, **GREEDY).finish_reason == "context"


def test_log_probabilities(demo: Qwen2VL) -> None:
    """Of the model's own logits: neither penalties nor biases nor temperature show in them."""
    talk = conversation(READ)
    ids, images = demo.encode_chat(talk)
    tokens = list(demo.generate(ids, images, max_new_tokens=40))[:-1]
    answer = demo.chat(talk, False, details=True, logprobs=True, top_logprobs=4, **GREEDY)
    found = answer.logprobs
    assert found is not None and [each.token for each in found] == tokens
    assert b"".join(each.bytes for each in found) == answer.text.encode()
    assert "".join(each.text for each in found) == answer.text
    rows = demo.logits(ids + tokens, images)[len(ids) - 1 : -1].astype(np.float64)
    expected = rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= rows.max(1, keepdims=True)
    for each, row in zip(found, expected, strict=True):
        assert each.logprob == pytest.approx(row[each.token], abs=0.02)  # fast: rows of a prompt differ
        assert each.logprob == each.top[0].logprob and each.token == each.top[0].token
        assert [top.logprob for top in each.top] == sorted((top.logprob for top in each.top), reverse=True)
        assert len(each.top) == 4 and all(top.top == () for top in each.top)
    loud = demo.chat(
        talk,
        False,
        details=True,
        logprobs=True,
        temperature=0.01,
        seed=1,
        max_new_tokens=1,
        logit_bias={tokens[0]: 50},
        repetition_penalty=1.5,
    )
    assert loud.logprobs is not None and loud.logprobs[0] == found[0]._replace(top=())
    parts = list(demo.chat(talk, details=True, logprobs=True, **GREEDY))
    assert [each for part in parts for each in part.logprobs] == [each._replace(top=()) for each in found]


def test_several_answers(demo: Qwen2VL, rows: list[list[int]]) -> None:
    """To one prompt, which is computed once; the i-th is that of seed + i."""
    talk = conversation(BOX)
    hot: Any = {"temperature": 1.5, "max_new_tokens": 12}
    alone = [demo.chat(talk, False, seed=2**64 - 2 + i if i < 2 else i - 2, **hot) for i in range(4)]
    demo.reset()
    rows.clear()
    found = demo.chat(talk, n=4, seed=2**64 - 2, **hot)
    assert found == alone and len(set(found)) > 1
    prompt = len(demo.encode_chat(talk)[0])
    assert sum(map(sum, rows)) < prompt + 4 * (12 + 64)
    answers = demo.chat(talk, False, n=4, seed=2**64 - 2, details=True, **hot)
    assert [answer.text for answer in answers] == alone
    assert demo.chat([talk, talk], n=1, seed=0, **hot) == [alone[2]] * 2
    assert demo.chat(talk, n=1, **GREEDY) == [demo.chat(talk, False, **GREEDY)]
    assert_all_given_back(demo)


def test_asyncio(demo: Qwen2VL) -> None:
    talk, other = conversation(WHAT), conversation(READ)
    expected = [demo.chat(t, False, **GREEDY) for t in (talk, other)]
    hot: Any = {"temperature": 1.5, "seed": 5, "max_new_tokens": 12}
    several = demo.chat(talk, n=2, **hot)

    async def run() -> None:
        answer = demo.achat(talk, details=True, logprobs=True, **GREEDY)
        pieces = [part.text async for part in answer]
        assert "".join(pieces) == answer.text == expected[0] and answer.logprobs
        both = await asyncio.gather(
            demo.achat(talk, False, details=True, **GREEDY), demo.achat(other, details=True, **GREEDY)
        )
        assert [each.text for each in both] == expected
        assert await demo.achat([talk, other], **GREEDY) == expected
        assert await demo.achat(talk, n=2, **hot) == several
        details = demo.achat(talk, n=2, details=True, **hot)
        assert [(await each).text for each in details] == several
        assert await demo.achat(talk, False, **GREEDY) == expected[0]
        left = asyncio.ensure_future(_first(demo.achat(talk, details=True, **GREEDY)))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left

    asyncio.run(run())
    gc.collect()
    assert_all_given_back(demo)


async def _first(answer: Answer) -> str:
    async for part in answer:
        await asyncio.sleep(5)
        return part.text
    return ""


def test_an_answer_that_is_left_ends(demo: Qwen2VL) -> None:
    answer = demo.chat(conversation(WHAT), details=True, **GREEDY)
    next(answer)
    answer.close()
    assert list(answer) == [] and answer.finish_reason == ""
    answer = demo.chat(conversation(WHAT), details=True, **GREEDY)
    next(answer)
    del answer
    gc.collect()
    assert_all_given_back(demo)
    answer = demo.chat(conversation(WHAT), details=True, **GREEDY)
    demo.close()
    with pytest.raises(Exception, match="closed"):
        next(answer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"logprobs": True}, "^logprobs: they are among the details: details=True"),
        ({"details": True, "top_logprobs": 2}, "^top_logprobs: expected logprobs=True beside it"),
        (
            {"details": True, "logprobs": True, "top_logprobs": 21},
            "^top_logprobs: expected an integer of 0 to 20",
        ),
        ({"details": True, "logprobs": 1}, "^logprobs: expected True or False, found 1"),
        ({"n": 0}, "^n: expected an integer of 1 to 128, found 0"),
        ({"n": 129}, "^n: expected an integer of 1 to 128, found 129"),
    ],
)
def test_what_cannot_be_asked(tiny: Qwen2VL, options: dict[str, Any], match: str) -> None:
    for chat in (tiny.chat, tiny.achat):
        with pytest.raises(ValueError, match=match):
            chat([{"role": "user", "content": "a"}], **options)
