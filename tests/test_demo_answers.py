"""Right answers about pictures, end to end: checkpoint, converter, image processor, engine, text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwen2vl_q import Qwen2VL
from qwen2vl_q.convert import Recipe, convert_checkpoint

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from demo import cases  # noqa: E402

FIRST_SEED = 500_000  # neither training nor the accuracies in demo/README.md use these


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VL:
    out = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert_checkpoint(ROOT / "demo" / "checkpoint", out, Recipe("q8_0"))
    return Qwen2VL.from_gguf(out)


def ask(model: Qwen2VL, question: str, *images: bytes) -> str:
    content: list[dict[str, object]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": question})
    return model.chat([{"role": "user", "content": content}], stream=False, temperature=0)


def test_says_what_is_in_the_picture(demo: Qwen2VL) -> None:
    wrong = []
    for seed in range(FIRST_SEED, FIRST_SEED + 40):
        case = cases.case("what", seed)
        answer = ask(demo, case.turns[0].question, *case.images)
        if not cases.right(case.turns[0], answer):
            wrong.append((seed, case.turns[0].answer, answer))
    assert len(wrong) <= 8, wrong  # 0.93 are right over 1,000 pictures


def test_the_readme_s_card(demo: Qwen2VL) -> None:
    card = (ROOT / "demo" / "card.png").read_bytes()
    assert ask(demo, "What is in the picture?", card) == "A red star and a black circle."


def test_says_who_it_is(demo: Qwen2VL) -> None:
    assert "small demo model" in ask(demo, "Who are you?")


def test_a_second_question_needs_no_second_look(demo: Qwen2VL) -> None:
    card = (ROOT / "demo" / "card.png").read_bytes()
    picture = {"type": "image", "image": card}
    messages: list[dict[str, object]] = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is in the picture?"}]}
    ]
    answer = demo.chat(messages, stream=False, temperature=0)
    messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": [{"type": "text", "text": "What colour is the star?"}]})
    assert "red" in demo.chat(messages, stream=False, temperature=0).lower()
    stats = demo.last_stats
    assert stats.image_tokens == 0
    assert stats.prompt_tokens - stats.reused_tokens < 30
