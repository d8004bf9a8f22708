"""Videos that are longer than a context: watched in parts, with notes, and what matters seen again.

Each part is described on its own, behind the same beginning, which is computed once; a summary is carried
along. Then the model names the parts that a question needs, and answers with these before its eyes and all
notes beside them. What has been noted is kept in a file, so that a run goes on where it was cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Protocol

from qwen2vl_q.base.atomic_file import whole_or_not_at_all
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.json_files import read_json_if_present
from qwen2vl_q.vision.image_processor import ProcessedImage
from qwen2vl_q.vision.video import VideoOptions

PART_SECONDS = 30.0
PART_TOKENS = 2560  # of a part's frames
LOOKS = 3  # parts that are seen again
MAX_PARTS = 4096
DESCRIBE = "Describe what happens here, in two or three sentences."

_WATCH = "You watch a long video part by part and take notes for someone who cannot see it."
_NOTE_TOKENS, _SUMMARY_TOKENS, _ANSWER_TOKENS = 160, 240, 512


class Model(Protocol):
    """What is needed of `Qwen2VL`."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def chat(self) -> Any: ...
    @property
    def load_video(self) -> Any: ...
    @property
    def tokenize(self) -> Any: ...


@dataclass(frozen=True)
class Part:
    """start, end: seconds."""

    start: float
    end: float
    text: str

    @property
    def times(self) -> str:
        return f"{clock(self.start)}-{clock(self.end)}"


@dataclass(frozen=True)
class VideoNotes:
    """summary: of all parts so far. looked_at: the parts, by index, that were seen again for the answer."""

    parts: tuple[Part, ...] = ()
    summary: str = ""
    looked_at: tuple[int, ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class Watching:
    """How a video is watched. describe: what is asked of each part; part_seconds, part_tokens: of each;
    model: whose notes these are, for the file that keeps them; options: of `chat`."""

    part_seconds: float = PART_SECONDS
    part_tokens: int = PART_TOKENS
    describe: str = DESCRIBE
    fps: float | None = None
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.part_seconds <= 3600:
            raise ValueError(f"part_seconds: expected 1 to 3600, found {self.part_seconds}")


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def watch(
    model: Model,
    video: str | PathLike[str],
    question: str | None,
    how: Watching,
    notes: str | PathLike[str] | None = None,
    on_part: Callable[[Part], None] | None = None,
) -> VideoNotes:
    """The timeline of a video file, a summary, and with a question its answer.

    notes: a file that keeps what has been noted; where it has notes of the same video, watched alike, they
    are gone on from. on_part: is told of each part, those of the file too. Errors of `load_video` and `chat`;
    FormatError for notes of something else, ValueError for more than MAX_PARTS parts.
    """
    from qwen2vl_q.vision.video_decoder import video_seconds

    seconds = video_seconds(video)
    spans = _spans(seconds, how.part_seconds)
    keeper = _Keeper(notes, _identity(Path(video), seconds, how))
    found = keeper.read()
    for part in found.parts:
        _tell(on_part, part)
    for start, end in spans[len(found.parts) :]:
        clip = model.load_video(video, VideoOptions(start=start, end=end, fps=how.fps), how.part_tokens)
        part = Part(start, end, _ask(model, how, _NOTE_TOKENS, [_shown(clip), how.describe]))
        summary = part.text if not found.parts else _ask(model, how, _SUMMARY_TOKENS, [_longer(found, part)])
        found = replace(found, parts=(*found.parts, part), summary=summary)
        keeper.write(found)
        _tell(on_part, part)
    if question is None:
        return found
    looked_at = _that_matter(model, how, found, question) if len(found.parts) > 1 else (0,)
    return replace(found, looked_at=looked_at, answer=_answer(model, video, how, found, looked_at, question))


def _spans(seconds: float, part_seconds: float) -> list[tuple[float, float]]:
    """Parts of equal length, near to what is wanted."""
    count = max(1, round(seconds / part_seconds))
    if count > MAX_PARTS:
        raise ValueError(f"part_seconds: {count} parts of a video, expected {MAX_PARTS} at most")
    length = seconds / count
    return [(i * length, max((i + 1) * length, 0.001)) for i in range(count)]


def _ask(model: Model, how: Watching, most: int, content: Iterable[Any]) -> str:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    messages = [{"role": "system", "content": _WATCH}, {"role": "user", "content": parts}]
    options = {"temperature": 0, "max_new_tokens": most, **how.options}
    return str(model.chat(messages, stream=False, **options)).strip()


def _shown(clip: ProcessedImage) -> dict[str, Any]:
    return {"type": "video", "video": clip}


def _longer(found: VideoNotes, part: Part) -> str:
    return (
        f"Summary of the video so far:\n{found.summary}\n\n"
        f"The part that follows, {part.times}:\n{part.text}\n\n"
        "Write the summary anew with this part in it, in at most 120 words."
    )


# --- the answer ---


def _that_matter(model: Model, how: Watching, found: VideoNotes, question: str) -> tuple[int, ...]:
    text = (
        f"{_timeline(model, found)}\n\nQuestion: {question}\n\nWhich of these parts have to be seen again to "
        f"answer it? Name at most {LOOKS}, by their numbers alone."
    )
    return named_parts(_ask(model, how, 32, [text]), found.parts, question)


def named_parts(answer: str, parts: Sequence[Part], question: str) -> tuple[int, ...]:
    """The parts, by index, that an answer names by their numbers from 1; where it names none, those whose
    notes share the most words with the question."""
    named = [int(number) - 1 for number in re.findall(r"\d{1,4}", answer)]
    there = [i for i in dict.fromkeys(named) if 0 <= i < len(parts)]
    if not there:
        asked = _words(question)
        there = sorted(range(len(parts)), key=lambda i: -len(asked & _words(parts[i].text)))
    return tuple(sorted(there[:LOOKS]))


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 2}


def _timeline(model: Model, found: VideoNotes) -> str:
    """All notes, cut to what takes a third of the context."""
    longest = max(len(part.text) for part in found.parts)
    while True:
        lines = [f"{i}. {part.times}: {part.text[:longest]}" for i, part in enumerate(found.parts, 1)]
        text = "\n".join(lines)
        if len(model.tokenize(text)) <= model.n_ctx // 3 or longest <= 8:
            return f"Notes on the video:\n{text}\n\nSummary: {found.summary}"
        longest //= 2


def _answer(
    model: Model,
    video: str | PathLike[str],
    how: Watching,
    found: VideoNotes,
    looked_at: tuple[int, ...],
    question: str,
) -> str:
    content: list[Any] = []
    if len(found.parts) > 1:
        content.append(f"{_timeline(model, found)}\n\nParts of it, seen again:\n")
    tokens = min(2 * how.part_tokens, model.n_ctx // 2 // len(looked_at))
    for i in looked_at:
        part = found.parts[i]
        clip = model.load_video(video, VideoOptions(start=part.start, end=part.end, fps=how.fps), tokens)
        content += [f"{part.times}: ", _shown(clip)] if len(found.parts) > 1 else [_shown(clip)]
    return _ask(model, how, _ANSWER_TOKENS, [*content, question])


# --- notes in a file ---


class _Keeper:
    def __init__(self, path: str | PathLike[str] | None, identity: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._identity = identity

    def read(self) -> VideoNotes:
        if self._path is None:
            return VideoNotes()
        kept = read_json_if_present(self._path)
        if not kept:
            return VideoNotes()
        if kept.get("of") != self._identity:
            raise FormatError(
                f"{self._path}: notes of another video, or watched in another way; remove it to start anew"
            )
        try:
            parts = kept["parts"]
            assert isinstance(parts, list)
            found = [Part(float(part["start"]), float(part["end"]), str(part["text"])) for part in parts]
            return VideoNotes(tuple(found), str(kept["summary"]))
        except (KeyError, TypeError, ValueError, AssertionError):
            raise FormatError(f"{self._path}: damaged; remove it to start anew") from None

    def write(self, found: VideoNotes) -> None:
        if self._path is None:
            return
        kept = {
            "of": self._identity,
            "summary": found.summary,
            "parts": [asdict(part) for part in found.parts],
        }
        with whole_or_not_at_all(self._path, overwrite=True) as part:
            part.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _identity(video: Path, seconds: float, how: Watching) -> dict[str, Any]:
    return {
        "video": fspath(video.absolute()),
        "bytes": video.stat().st_size,
        "seconds": round(seconds, 3),
        "part_seconds": how.part_seconds,
        "part_tokens": how.part_tokens,
        "describe": how.describe,
        "fps": how.fps,
        "model": how.model,
    }


def _tell(on_part: Callable[[Part], None] | None, part: Part) -> None:
    if on_part is not None:
        on_part(part)
