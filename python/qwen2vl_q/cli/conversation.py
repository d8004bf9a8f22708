"""A conversation of the command line: its history, the pictures to come, and what it prints of them."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen2vl_q.chat.messages import ImagePart, Message, TextPart
from qwen2vl_q.cli import transcript
from qwen2vl_q.cli.output import count
from qwen2vl_q.cli.progress import StageBars
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.engine.stats import GenerationStats
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.vision.image_processor import ProcessedImage, picture_size

DEFAULT_TOKENS = 1280  # of a picture: what the model card suggests for speed


class Conversation:
    """Messages are as Qwen2VL.chat takes them, their pictures loaded."""

    def __init__(self, model: Qwen2VL, system: str | None, settings: Settings) -> None:
        """ValueError for settings out of range."""
        settings.in_use(model)
        self.system = system
        self.settings = settings
        self._model = model
        self._history: list[dict[str, Any]] = []
        self._pending: list[ProcessedImage] = []
        self._sources: dict[bytes, ImagePart] = {}  # a loaded picture's key -> what was loaded

    def set(self, **changes: Any) -> None:
        """Changes settings; the pictures of the next question follow other bounds. ValueError for a value out
        of range."""
        settings = replace(self.settings, **changes)
        settings.in_use(self._model)
        self.settings = settings
        if changes.keys() & {"min_pixels", "max_pixels", "vision_tokens"}:
            self._fit([self._sources[old.key].image for old in self._pending])

    def settings_in_use(self) -> dict[str, Any]:
        return self.settings.in_use(self._model)

    # --- pictures ---

    def attach(self, picture: str | bytes) -> tuple[int, int]:
        """Puts a picture (a path, or a file's bytes) before the next question; returns the tokens that it
        takes, and those of its full resolution."""
        # Absolute: a saved conversation is good from any folder.
        source = str(Path(picture).absolute()) if isinstance(picture, str) else picture
        self._fit([*(self._sources[old.key].image for old in self._pending), source])
        return self._tokens(self._pending[-1]), self._model.image_processor.tokens(*picture_size(source))

    def pending_tokens(self) -> list[int]:
        """Of each picture that waits for the next question."""
        return [self._tokens(image) for image in self._pending]

    def pixels(self, tokens: int) -> int:
        """As max_pixels, it makes a picture take that many tokens at most."""
        processor = self._model.image_processor
        return tokens * (processor.patch_size * processor.merge_size) ** 2

    def _fit(self, sources: list[Any]) -> None:
        """Makes them the next question's pictures, as large as the settings let them be."""
        budget, most, least = self.settings.vision_tokens, self.settings.max_pixels, self.settings.min_pixels
        if budget:
            self._pending = self._model.load_images(sources, budget)
            for source, image in zip(sources, self._pending, strict=True):
                self._sources[image.key] = self._part_of(source, image)
            return
        self._pending = [
            self._load(ImagePart(source, least, self._most_of(source) if most is None else most))
            for source in sources
        ]

    def _most_of(self, source: Any) -> int | None:
        """max_pixels of a picture, where nothing has been said: of one that takes no more, none."""
        processor = self._model.image_processor
        if not self.settings.shrinks_by_default or processor.tokens(*picture_size(source)) <= DEFAULT_TOKENS:
            return None
        return max(self.pixels(DEFAULT_TOKENS), self.settings.min_pixels or 0)

    def _part_of(self, source: Any, image: ProcessedImage) -> ImagePart:
        """What makes the same picture again."""
        side = self._model.image_processor.patch_size
        _, rows, columns = image.grid_thw
        return ImagePart(source, resized=(rows * side, columns * side))

    def _load(self, part: ImagePart) -> ProcessedImage:
        image = self._model.load_image(
            part.image, part.min_pixels, part.max_pixels, part.resized, part.detail
        )
        self._sources[image.key] = part
        return image

    def _tokens(self, image: ProcessedImage) -> int:
        return math.prod(image.grid_thw) // self._model.image_processor.merge_size**2

    # --- questions ---

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. One that is cut short stays in the history as far as it came; where
        nothing came, the question and its pictures do not count as asked."""
        pictures = [{"type": "image", "image": image} for image in self._pending]
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
        return [
            {"type": "image", "image": self._load(part)}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else part.for_message()
            for part in message.content
        ]

    def _system_message(self) -> list[dict[str, Any]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def stats(self) -> str:
        return describe_stats(self._model.last_stats)


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
    parts.append(
        f"answer {stats.generated_tokens} tokens in {stats.decode_seconds:.2f} s "
        f"({stats.decode_tokens_per_second:.1f} tok/s)"
    )
    memory = f"KV cache {stats.kv_bytes / 1e6:.1f} MB"
    if stats.peak_memory_bytes is not None:
        memory = f"peak memory {stats.peak_memory_bytes / 1e9:.2f} GB, {memory}"
    return "; ".join([*parts, memory])
