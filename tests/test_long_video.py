"""Videos in parts: notes that are kept, what is seen again; and a film of cards, told rightly."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import PROGRAM, Run
from films import encoded, fade
from qwen2vl_q import DEMO_MODEL, FormatError, Qwen2VL
from qwen2vl_q.demo.cards import article, example, listing
from qwen2vl_q.tasks.long_video import Part, Watching, clock, named_parts, watch

pytest.importorskip("av", reason="needs the extra video")

WHAT = "What is in the picture?"


class Scripted:
    """Answers by the kind of question, and keeps what it was asked and shown."""

    n_ctx = 4096

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.shown: list[tuple[float | None, float | None, int | None]] = []
        self.asked: list[list[Any]] = []

    def load_video(self, video: Any, options: Any, vision_tokens: int | None) -> Any:
        if len(self.shown) == self.fails_at:
            raise KeyboardInterrupt
        self.shown.append((options.start, options.end, vision_tokens))
        return f"clip {len(self.shown)}"

    def tokenize(self, text: str) -> list[int]:
        return [0] * (len(text) // 4)

    def chat(self, messages: Any, stream: bool, **options: Any) -> str:
        content = messages[-1]["content"]
        self.asked.append(content)
        text = content[-1]["text"]
        if "seen again to answer" in text:
            return "2, 3 and 99"
        if text.startswith("Summary of the video so far"):
            return f"summary {text.count('clip')}"
        if text == "Who?":
            return "It was her."
        return f"what clip {len(self.shown)} shows"


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.mp4"
    path.write_bytes(fade(401, fps=10))
    return path


def test_times_on_a_clock() -> None:
    assert [clock(s) for s in (0, 9.6, 75, 3723)] == ["0:00", "0:10", "1:15", "1:02:03"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2", (1,)),
        ("Parts 3 and 1.", (0, 2)),
        ("4, 3, 2, 1", (1, 2, 3)),
        ("7", (0, 1, 3)),
        ("none", (0, 1, 3)),
        ("2, 2, 2", (1,)),
    ],
)
def test_parts_that_an_answer_names(answer: str, expected: tuple[int, ...]) -> None:
    texts = ["a dog runs", "a red car stops", "night falls", "the red dog barks"]
    parts = [Part(10 * i, 10 * i + 10, text) for i, text in enumerate(texts)]
    assert named_parts(answer, parts, "Where is the red dog?") == expected


def test_parts_are_described_and_those_that_matter_seen_again(film: Path) -> None:
    model = Scripted()
    told: list[Part] = []
    found = watch(model, film, "Who?", Watching(10, 500), on_part=told.append)
    assert [(p.start, p.end) for p in found.parts] == [(0, 10), (10, 20), (20, 30), (30, 40)]
    assert [p.text for p in found.parts] == [f"what clip {i} shows" for i in range(1, 5)]
    assert told == list(found.parts) and found.summary.startswith("summary")
    assert model.shown == [
        (0, 10, 500), (10, 20, 500), (20, 30, 500), (30, 40, 500), (10, 20, 1000), (20, 30, 1000)
    ]  # fmt: skip
    assert (found.looked_at, found.answer) == ((1, 2), "It was her.")
    last = model.asked[-1]
    assert [part["type"] for part in last] == ["text", "text", "video", "text", "video", "text"]
    assert all(f"what clip {i} shows" in last[0]["text"] for i in range(1, 5))


def test_a_short_video_is_one_part(film: Path) -> None:
    model = Scripted()
    found = watch(model, film, "Who?", Watching(60, 500))
    assert len(found.parts) == 1 and found.answer == "It was her."
    assert [part["type"] for part in model.asked[-1]] == ["video", "text"]


def test_notes_are_cut_to_the_context(film: Path) -> None:
    model = Scripted()
    model.n_ctx = 60
    watch(model, film, "Who?", Watching(10, 20))
    assert len(model.tokenize(model.asked[-1][0]["text"])) < 50


def test_a_run_that_was_cut_goes_on(film: Path, tmp_path: Path) -> None:
    whole = watch(Scripted(), film, None, Watching(10, 500))
    notes = tmp_path / "notes.json"
    with pytest.raises(KeyboardInterrupt):
        watch(Scripted(fails_at=2), film, None, Watching(10, 500), notes)
    model = Scripted()
    model.shown = [(None, None, None)] * 2
    told: list[Part] = []
    assert watch(model, film, None, Watching(10, 500), notes, told.append) == whole
    assert len(model.shown) == 4 and told == list(whole.parts)
    assert watch(Scripted(fails_at=0), film, None, Watching(10, 500), notes) == whole


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ('{"of": {}}', "notes of another video"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_notes_of_something_else(film: Path, tmp_path: Path, kept: str, message: str) -> None:
    notes = tmp_path / "notes.json"
    notes.write_text(kept)
    with pytest.raises(FormatError, match=f"notes.json: {message}"):
        watch(Scripted(), film, None, Watching(10, 500), notes)
    assert notes.read_text() == kept


def test_notes_that_are_damaged(film: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    watch(Scripted(), film, None, Watching(10, 500), notes)
    kept = json.loads(notes.read_text())
    for parts in ([{"start": 1}], "x", [3], [{"start": "a", "end": 1, "text": ""}]):
        notes.write_text(json.dumps({**kept, "parts": parts}))
        with pytest.raises(FormatError, match="damaged"):
            watch(Scripted(), film, None, Watching(10, 500), notes)


def test_too_many_parts(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2vl_q.vision.video_decoder.video_seconds", lambda _: 1e6)
    with pytest.raises(ValueError, match="4096 at most"):
        watch(Scripted(), film, None, Watching(1, 500))
    for seconds in (0.5, 4000, float("nan")):
        with pytest.raises(ValueError, match="part_seconds"):
            Watching(seconds)


# --- the demo model's cards, three seconds each ---


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A film, and what its parts show."""
    frames, truths = [], []
    for seed in (0, 2, 3):
        card, things = example(seed)
        small = card.resize((168, 168), Image.Resampling.BICUBIC)
        frames += [np.asarray(small)] * 12
        truths.append(listing([article(thing.full_name) for thing in things]))
    path = tmp_path_factory.mktemp("film") / "cards.mp4"
    path.write_bytes(encoded(frames, fps=4))
    return path, truths


def things(text: str) -> list[str]:
    return sorted(text.lower().rstrip(".").replace(" and ", ", ").split(", "))


def test_a_film_of_cards(cards: tuple[Path, list[str]]) -> None:
    path, truths = cards
    with Qwen2VL.from_gguf(DEMO_MODEL) as model:
        found = model.video(path, WHAT, part_seconds=3, describe=WHAT, part_tokens=140)
    assert [things(part.text) for part in found.parts] == [things(truth) for truth in truths]
    assert found.summary and found.answer and found.looked_at


def test_the_command(run: Run, cards: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, truths = cards
    asked = ["video", path, "--part", "3", "--describe", WHAT, "--vision-tokens", "140", "-t", "1"]
    code, out, err = run(*asked, "--notes", tmp_path / "n.json")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert [line[:11] for line in lines[:3]] == ["0:00-0:03  ", "0:03-0:06  ", "0:06-0:09  "]
    assert [things(line[11:]) for line in lines[:3]] == [things(truth) for truth in truths]
    assert lines[4].startswith("Summary: ")
    code, out, err = run(*asked, "--notes", tmp_path / "n.json", "-p", WHAT, "--json")
    found = json.loads(out)
    assert [things(part["text"]) for part in found["parts"]] == [things(truth) for truth in truths]
    assert set(found) == {"parts", "summary", "looked_at", "answer"} and found["answer"]


def test_the_command_goes_on_after_a_kill(cards: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Its own notes, in the cache's folder."""
    path, truths = cards
    asked = [*PROGRAM, "video", str(path), "--part", "3", "--describe", WHAT, "--vision-tokens", "140"]
    environment = {"QWEN2VL_CACHE": str(tmp_path)}
    with subprocess.Popen(asked, stdout=subprocess.PIPE, env={**_environment(), **environment}) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.kill()
    (notes,) = (tmp_path / "video").glob("cards-*.json")
    assert 1 <= len(json.loads(notes.read_text())["parts"]) <= 3
    done = subprocess.run(asked, capture_output=True, env={**_environment(), **environment})
    assert done.returncode == 0 and done.stdout.startswith(first)
    told = [line[11:] for line in done.stdout.decode().splitlines()[:3]]
    assert [things(line) for line in told] == [things(truth) for truth in truths]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}
