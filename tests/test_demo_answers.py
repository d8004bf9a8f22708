"""Right answers about pictures, end to end: checkpoint, converter, image processor, engine, text.

`python -m tests.test_demo_answers` prints the table of floors anew, for a new checkpoint.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from demo import cases, evaluate
from demo.cases import Case
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.cli.main import main
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint
from qwen2vl_q.demo import cards

ROOT = Path(__file__).parents[1]
FIRST_SEED = 500_000  # neither training nor the accuracies in demo/README.md use these
PER_TASK = 60
SPARE = 3  # of 60: what another instruction set, or a Pillow that draws edges otherwise, may cost

# Right answers of 60, at least; `python -m demo.quantization` measures the other types.
COLUMNS: tuple[FileType, ...] = ("q4_0", "q8_0", "f16", "bf16")
FLOORS: dict[str, tuple[int, ...]] = {
    "what": (57, 57, 57, 57),
    "attribute": (57, 57, 57, 57),
    "read": (54, 54, 54, 54),
    "count": (53, 54, 54, 54),
    "box": (51, 51, 51, 51),
    "present": (57, 57, 57, 57),
    "absent": (57, 57, 57, 57),
    "which": (57, 57, 57, 57),
    "differ": (46, 45, 46, 46),
    "chat": (57, 57, 57, 57),
    "second": (52, 52, 52, 52),
    "alone": (52, 52, 52, 52),
    "point": (52, 52, 52, 52),
    "form": (50, 50, 49, 49),
    "field": (54, 54, 54, 54),
    "move": (57, 57, 57, 57),
    "order": (57, 57, 57, 57),
    "bounce": (57, 57, 57, 57),
}


@cache
def asked(per_task: int) -> list[Case]:
    return [cases.case(task, FIRST_SEED + k) for task in cases.TASKS for k in range(per_task)]


@pytest.fixture(scope="module")
def demo() -> Qwen2VL:
    return Qwen2VL.from_gguf(DEMO_MODEL)


def convert(type: FileType, folder: Path) -> Path:
    out = folder / f"{type}.gguf"
    convert_checkpoint(ROOT / "demo" / "checkpoint", out, Recipe(type), "Qwen2VL demo")
    return out


def answers(model: Path, questions: Sequence[Case]) -> list[str]:
    return evaluate.run(questions, evaluate.with_gguf(str(model)), len(questions))


def right_answers(model: Path) -> dict[str, int]:
    """Of PER_TASK, for each task."""
    questions = asked(PER_TASK)
    right = dict.fromkeys(cases.TASKS, 0)
    for case, answer in zip(questions, answers(model, questions), strict=True):
        right[case.task] += cases.right(case.turns[-1], answer)
    return right


def same(a: str, b: str) -> bool:
    """Identical, but that a box's corners and a point may differ a little: the last digits of 0..999 are near
    ties."""
    if a.partition("(")[0] != b.partition("(")[0]:
        return False
    boxes, points = [cases.parse_box(x) for x in (a, b)], [cases.parse_point(x) for x in (a, b)]
    if boxes[0] and boxes[1]:
        return cases.iou(boxes[0], boxes[1]) >= 0.8
    if points[0] and points[1]:
        return math.dist(points[0], points[1]) <= 25
    return a == b


def test_the_packaged_file_is_the_checkpoint(tmp_path: Path) -> None:
    """Where not: demo/README.md, "Commands", says how the file is made."""
    assert convert("q8_0", tmp_path).read_bytes() == DEMO_MODEL.read_bytes()


@pytest.mark.parametrize("type", COLUMNS)
def test_right_answers(type: FileType, tmp_path: Path) -> None:
    column = COLUMNS.index(type)
    floors = {task: row[column] for task, row in FLOORS.items()}
    right = right_answers(convert(type, tmp_path))
    assert floors.keys() == right.keys()
    missed = [task for task in right if right[task] < floors[task]]
    assert not missed, f"{type}: {missed} below their floors: found {right}, floors {floors}"


@pytest.mark.parametrize("isa", _native.supported_isas()[1:])
def test_instruction_sets_agree(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first one. Plain C++ is slow, so it gets fewer questions."""
    questions = asked(5 if isa == "generic" else 20)
    found = []
    for each in (_native.supported_isas()[0], isa):
        monkeypatch.setenv("QWEN2VL_ISA", each)
        found.append(answers(DEMO_MODEL, questions))
    differing = [
        (case.turns[-1].question, a, b)
        for case, a, b in zip(questions, *found, strict=True)
        if not same(a, b)
    ]
    assert len(differing) <= 0.02 * len(questions), differing


def test_says_who_it_is(demo: Qwen2VL) -> None:
    assert "small demo model" in demo.chat(
        [{"role": "user", "content": "Who are you?"}], False, temperature=0
    )


def test_a_second_question_needs_no_second_look(demo: Qwen2VL) -> None:
    card, things = cards.example(0)
    content = [{"type": "image", "image": card}, {"type": "text", "text": "What is in the picture?"}]
    messages: list[dict[str, object]] = [{"role": "user", "content": content}]
    answer = demo.chat(messages, stream=False, temperature=0)
    messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": "How many shapes are there?"})
    assert demo.chat(messages, stream=False, temperature=0) == f"{len(things)} shapes."
    stats = demo.last_stats
    assert stats.image_tokens == 0
    assert stats.prompt_tokens - stats.reused_tokens < 30


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_the_readme_shows_what_the_demo_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    assert capsys.readouterr().out in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("elsewhere")
def test_the_demo_command_is_mostly_right(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for seed in range(20):
        assert main(["demo", "--seed", str(seed)]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = [line.removeprefix("  answer  ") for line in lines if line.startswith("  answer  ")]
        truth = [line.removeprefix("  truth   ") for line in lines if line.startswith("  truth   ")]
        assert len(found) == len(truth) == 3
        for thing in cards.example(seed)[1]:
            assert thing.full_name in truth[0]
        wrong += [(seed, a, t) for a, t in zip(found, truth, strict=True) if a != t]
    assert len(wrong) <= 3, wrong  # none, when the checkpoint was made


def print_floors() -> None:
    with tempfile.TemporaryDirectory() as folder:
        right = [right_answers(convert(type, Path(folder))) for type in COLUMNS]
    print(f"COLUMNS: tuple[FileType, ...] = {COLUMNS}")
    print("FLOORS: dict[str, tuple[int, ...]] = {")
    for task in cases.TASKS:
        print(f'    "{task}": ({", ".join(str(r[task] - SPARE) for r in right)}),')
    print("}")


if __name__ == "__main__":
    print_floors()
