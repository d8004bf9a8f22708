"""A conversation of the command line: its history, the pictures to come, and what it prints of them."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from qwen2vl_q.cli.progress import StageBars
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.stats import GenerationStats


class Conversation:
    """`settings` are keyword arguments of Qwen2VL.chat."""

    def __init__(self, model: Qwen2VL, system: str | None, settings: Mapping[str, Any]) -> None:
        self.system = system
        self._model = model
        self._settings = settings
        self._history: list[dict[str, Any]] = []
        self._pending: list[dict[str, Any]] = []
        self._paths: dict[bytes, str] = {}  # by the picture's key

    def attach(self, path: str) -> int:
        """Puts a picture before the next question; returns the tokens that it will take."""
        image = self._model.load_image(path)
        self._pending.append({"type": "image", "image": image})
        self._paths[image.key] = path
        _, rows, columns = image.grid_thw
        return rows * columns // self._model.image_processor.merge_size**2

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. One that is cut short stays in the history as far as it came; where
        nothing came, the question and its pictures do not count as asked."""
        content = [*self._pending, {"type": "text", "text": question}] if self._pending else question
        turn = {"role": "user", "content": content}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        answer: list[str] = []
        with StageBars() as bars:
            try:
                for piece in self._model.chat(
                    [*system, *self._history, turn], progress=bars, **self._settings
                ):
                    bars.close()
                    answer.append(piece)
                    yield piece
            finally:
                if answer:
                    self._history += [turn, {"role": "assistant", "content": "".join(answer)}]
                    self._pending = []

    def clear(self) -> None:
        """Forgets everything but the system prompt."""
        self._history = []
        self._pending = []

    def save(self, path: Path) -> None:
        """Writes the conversation: the messages where the name ends in .json, otherwise Markdown."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *map(self._with_paths, self._history)]
        if path.suffix.lower() == ".json":
            text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(
                f"## {message['role']}\n\n{_markdown(message['content'])}\n" for message in messages
            )
        path.write_text(text, encoding="utf-8")

    def _with_paths(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message["content"]
        if isinstance(content, list):
            content = [
                {"type": "image", "image": self._paths[part["image"].key]}
                if part["type"] == "image"
                else part
                for part in content
            ]
        return {"role": message["role"], "content": content}

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


def _markdown(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n\n".join(f"![]({part['image']})" if "image" in part else part["text"] for part in content)
