"""A conversation of the command line: its history, the pictures to come, and what it prints of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen2vl_q.chat.messages import ImagePart, Message, TextPart, VideoPart, Visual
from qwen2vl_q.cli import transcript
from qwen2vl_q.cli.output import count
from qwen2vl_q.cli.progress import StageBars
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.engine.stats import GenerationStats
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.vision.image_processor import ProcessedImage, picture_size
from qwen2vl_q.vision.video import VideoOptions

DEFAULT_TOKENS = 1280  # of a picture: what the model card suggests for speed
CLIP_TOKENS = 4 * DEFAULT_TOKENS


@dataclass(frozen=True)
class _Shown:
    """With the next question. asked: as it was attached."""

    asked: Visual
    image: ProcessedImage


class Conversation:
    """Messages are as Qwen2VL.chat takes them, their pictures loaded."""

    def __init__(self, model: Qwen2VL, system: str | None, settings: Settings) -> None:
        """ValueError for settings out of range."""
        settings.in_use(model)
        self.system = system
        self.settings = settings
        self._model = model
        self._history: list[dict[str, Any]] = []
        self._pending: list[_Shown] = []
        self._sources: dict[bytes, Visual] = {}  # a loaded picture's key -> what makes the same again

    def set(self, **changes: Any) -> None:
        """Changes settings; the pictures of the next question follow other bounds. ValueError for a value out
        of range."""
        settings = replace(self.settings, **changes)
        settings.in_use(self._model)
        self.settings = settings
        if changes.keys() & {"min_pixels", "max_pixels", "vision_tokens"}:
            self._pending = self._fitted([shown.asked for shown in self._pending])

    def settings_in_use(self) -> dict[str, Any]:
        return self.settings.in_use(self._model)

    # --- pictures ---

    def attach(self, picture: str | bytes) -> tuple[int, int]:
        """Puts a picture (a path, or a file's bytes) before the next question; returns the tokens that it
        takes, and those of its full resolution."""
        # Absolute: a saved conversation is good from any folder.
        source = str(Path(picture).absolute()) if isinstance(picture, str) else picture
        tokens = self._tokens(self._show(ImagePart(source)))
        return tokens, self._model.image_processor.tokens(*picture_size(source))

    def attach_clip(self, clip: VideoPart) -> tuple[int, int, int, int]:
        """Puts a clip before the next question; returns how many frames of which width and height are shown,
        and the tokens that they take."""
        shown = self._show(clip)
        frames, height, width, _ = shown.pixels.shape
        return frames, width, height, self._tokens(shown)

    def pending_tokens(self) -> list[int]:
        """Of each picture that waits for the next question."""
        return [self._tokens(shown.image) for shown in self._pending]

    def pixels(self, tokens: int) -> int:
        """As max_pixels, it makes a picture take that many tokens at most."""
        processor = self._model.image_processor
        return tokens * (processor.patch_size * processor.merge_size) ** 2

    def _show(self, part: Visual) -> ProcessedImage:
        if self.settings.vision_tokens:  # which they share
            self._pending = self._fitted([*(shown.asked for shown in self._pending), part])
        else:
            self._pending += self._fitted([part])
        return self._pending[-1].image

    def _fitted(self, parts: list[Visual]) -> list[_Shown]:
        """As large as the settings let them be."""
        budget = self.settings.vision_tokens
        bounded = [self._bounded(part) for part in parts]
        if budget:
            images = self._model.load_images(bounded, budget)
        else:
            by_default = CLIP_TOKENS if self.settings.shrinks_by_default else None
            images = [self._load(part, by_default) for part in bounded]
        for part, image in zip(bounded, images, strict=True):
            if budget or isinstance(part, VideoPart):
                part = self._again(part, image)
            self._sources[image.key] = part
        return [_Shown(*pair) for pair in zip(parts, images, strict=True)]

    def _bounded(self, part: Visual) -> Visual:
        least, most = self.settings.min_pixels, self.settings.max_pixels
        if isinstance(part, VideoPart):
            return replace(part, options=replace(part.options, min_pixels=least, max_pixels=most))
        return replace(part, min_pixels=least, max_pixels=self._most_of(part.image) if most is None else most)

    def _most_of(self, source: Any) -> int | None:
        """max_pixels of a picture, where nothing has been said: of one that takes no more, none."""
        processor = self._model.image_processor
        if not self.settings.shrinks_by_default or processor.tokens(*picture_size(source)) <= DEFAULT_TOKENS:
            return None
        return max(self.pixels(DEFAULT_TOKENS), self.settings.min_pixels or 0)

    def _load(self, part: Visual, clip_tokens: int | None = None) -> ProcessedImage:
        if isinstance(part, VideoPart):
            return self._model.load_video(part.video, part.options, clip_tokens)
        return self._model.load_image(part.image, part.min_pixels, part.max_pixels, part.resized, part.detail)

    def _again(self, part: Visual, image: ProcessedImage) -> Visual:
        """What makes the same picture again."""
        side = self._model.image_processor.patch_size
        steps, rows, columns = image.grid_thw
        size = rows * side, columns * side
        if isinstance(part, ImagePart):
            return ImagePart(part.image, resized=size)
        options, frames = part.options, steps * self._model.image_processor.temporal_patch_size
        return VideoPart(
            part.video, VideoOptions(nframes=frames, start=options.start, end=options.end, resized=size)
        )

    def _tokens(self, image: ProcessedImage) -> int:
        return math.prod(image.grid_thw) // self._model.image_processor.merge_size**2

    # --- questions ---

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. One that is cut short stays in the history as far as it came; where
        nothing came, the question and its pictures do not count as asked."""
        pictures = [_message_part(shown.image) for shown in self._pending]
        content = [*pictures, {"type": "text", "text": question}] if pictures else question
        turn = {"role": "user", "content": content}
        answer: list[str] = []
        with StageBars() as bars:
            try:
                for piece in self._model.chat(
                    [*self._system_message(), *self._history, turn], progress=bars, **self.settings.for_chat()
                ):
                    bars.close()
                    answer.append(piece)
                    yield piece
            finally:
                if answer:
                    self._history += [turn, {"role": "assistant", "content": "".join(answer)}]
                    self._pending = []

    def cut_short(self) -> str:
        """Why the last answer ended before its end; "" where it did not."""
        stats = self._model.last_stats
        if stats.finish_reason == "length":
            return f"the answer was cut after {count(stats.generated_tokens, 'token')} (-n)"
        return f"the context is full: {self._model.n_ctx} cells (--ctx)" if self.is_full else ""

    @property
    def is_full(self) -> bool:
        """Whether the context left no room for the last answer's end."""
        return self._model.last_stats.finish_reason == "context"

    # --- the whole ---

    def clear(self) -> None:
        """Forgets everything but the system prompt and the settings."""
        self._history = []
        self._pending = []
        self._sources = {}

    def save(self, path: Path) -> None:
        """Writes the conversation: as messages to FILE.json, as Markdown to FILE.md."""
        transcript.write(path, [*self._system_message(), *self._history], self._sources)

    def load(self, path: Path) -> str:
        """Replaces the conversation by one from a .json file; returns what it holds. OSError, FormatError or
        ValueError, and no change, for one that cannot go on."""
        loaded = Conversation(self._model, self.system, self.settings)
        messages = transcript.read(path)
        loaded._take(messages)
        prompt, pictures = self._model.encode_chat([*loaded._system_message(), *loaded._history])
        if len(prompt) >= self._model.n_ctx:
            raise ValueError(
                f"{path}: takes {len(prompt)} tokens, but the context holds {self._model.n_ctx} (--ctx)"
            )
        self.system, self._history, self._pending = loaded.system, loaded._history, []
        self._sources = loaded._sources
        parts = ((messages, "message"), (pictures, "picture"), (prompt, "token"))
        return ", ".join(count(len(items), noun) for items, noun in parts)

    def _take(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if message.role == "system":
                self.system = str(message.content)
            else:
                self._history.append({"role": message.role, "content": self._content(message)})

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        if isinstance(message.content, str):
            return message.content
        parts: list[dict[str, Any]] = []
        for part in message.content:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                image = self._load(part)
                self._sources[image.key] = part
                parts.append(_message_part(image))
        return parts

    def _system_message(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def stats(self) -> str:
        return describe_stats(self._model.last_stats)


def _message_part(image: ProcessedImage) -> dict[str, Any]:
    kind = "video" if image.is_video else "image"
    return {"type": kind, kind: image}


def describe_stats(stats: GenerationStats) -> str:
    """A line of what a call took."""
    parts = []
    if stats.image_tokens:
        parts.append(f"images {stats.image_tokens} tokens in {stats.encode_seconds:.2f} s")
    evaluated = stats.prompt_tokens - stats.reused_tokens
    parts.append(
        f"prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused), {evaluated} in "
        f"{stats.prefill_seconds:.2f} s ({stats.prefill_tokens_per_second:.1f} tok/s)"
    )
    guessed = f" ({stats.confirmed_tokens} guessed)" if stats.confirmed_tokens else ""
    parts.append(
        f"answer {stats.generated_tokens} tokens{guessed} in {stats.decode_seconds:.2f} s "
        f"({stats.decode_tokens_per_second:.1f} tok/s)"
    )
    memory = f"KV cache {stats.kv_bytes / 1e6:.1f} MB"
    if stats.peak_memory_bytes is not None:
        memory = f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB, {memory}"
    return "; ".join([*parts, memory])
