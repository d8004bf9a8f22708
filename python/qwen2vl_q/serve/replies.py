"""What the OpenAI API answers, made of `Answer`s."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from time import time
from typing import Any, Protocol

from qwen2vl_q.chat.messages import ToolCall
from qwen2vl_q.engine.answer import Answer, Part, TokenLogprob


class Reply(Protocol):
    """Of one request."""

    def whole(self, answers: Sequence[Answer], queue_seconds: float) -> dict[str, Any]:
        """A body, once all have ended."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """A chunk before an answer's first."""

    def chunk(self, index: int, part: Part) -> dict[str, Any]: ...

    def closing(self, index: int, answer: Answer, queue_seconds: float) -> dict[str, Any]:
        """The chunk that says why an answer has ended."""

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The chunk behind all others, where it has been asked for."""


class _Base:
    """n: answers to each prompt, which stand side by side."""

    kind = ""
    chunk_kind = ""

    def __init__(self, prefix: str, model: str, fingerprint: str, n: int) -> None:
        self._n = n
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_kind,
            "created": int(time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def _body(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "object": self.kind, "choices": choices, **more}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {**self._head, "choices": choices, **more}

    def opening(self, index: int) -> dict[str, Any] | None:
        return None

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return self._chunk([], usage=self._usage(answers))

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Of the n answers to a prompt, the first counts it."""
        prompts = [answer.stats for answer in answers[:: self._n]]
        prompt = sum(stats.prompt_tokens for stats in prompts)
        drawn = sum(answer.stats.generated_tokens for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": drawn,
            "total_tokens": prompt + drawn,
            "prompt_tokens_details": {
                "cached_tokens": sum(stats.reused_tokens for stats in prompts),
                "image_tokens": sum(stats.prompt_image_tokens for stats in prompts),
            },
        }


class ChatReply(_Base):
    """Of /v1/chat/completions. logprobs: whether they have been asked for."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, model: str, fingerprint: str, n: int, logprobs: bool) -> None:
        super().__init__("chatcmpl", model, fingerprint, n)
        self._logprobs = logprobs
        self._calls: dict[int, int] = {}  # of each answer, those that have been told

    def whole(self, answers: Sequence[Answer], queue_seconds: float) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
            if answer.tool_calls:
                message["content"] = answer.text or None
                message["tool_calls"] = [call.for_message() for call in answer.tool_calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._told(answer.logprobs or ()),
                    "finish_reason": finish_reason(answer),
                }
            )
        return self._body(choices, usage=self._usage(answers), timings=timings(answers, queue_seconds))

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk([self._choice(index, {"role": "assistant", "content": ""})])

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": part.text} if part.text else {}
        if part.tool_calls:
            delta["tool_calls"] = [self._call(index, call) for call in part.tool_calls]
        return self._chunk([{**self._choice(index, delta), "logprobs": self._told(part.logprobs)}])

    def closing(self, index: int, answer: Answer, queue_seconds: float) -> dict[str, Any]:
        choice = self._choice(index, {}, finish_reason(answer))
        return self._chunk([choice], timings=timings([answer], queue_seconds))

    def _choice(self, index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def _call(self, index: int, call: ToolCall) -> dict[str, Any]:
        nth = self._calls.get(index, 0)
        self._calls[index] = nth + 1
        return {"index": nth, **call.for_message()}

    def _told(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [_token(t, t.top) for t in logprobs], "refusal": None}


def _token(t: TokenLogprob, top: Iterable[TokenLogprob] | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {"token": t.text, "logprob": t.logprob, "bytes": list(t.bytes)}
    return told if top is None else {**told, "top_logprobs": [_token(other) for other in top]}


class TextReply(_Base):
    """Of /v1/completions. prefixes: of each answer, what stands before it (echo)."""

    kind = chunk_kind = "text_completion"

    def __init__(self, model: str, fingerprint: str, n: int, prefixes: Sequence[str], logprobs: bool) -> None:
        super().__init__("cmpl", model, fingerprint, n)
        self._prefixes = prefixes
        self._logprobs = logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Answer], queue_seconds: float) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._prefixes[index] + answer.text,
                "logprobs": self._told(index, answer.logprobs or ()),
                "finish_reason": finish_reason(answer),
            }
            for index, answer in enumerate(answers)
        ]
        return self._body(choices, usage=self._usage(answers), timings=timings(answers, queue_seconds))

    def opening(self, index: int) -> dict[str, Any] | None:
        prefix = self._prefixes[index]
        return self._chunk([self._choice(index, prefix)]) if prefix else None

    def chunk(self, index: int, part: Part) -> dict[str, Any]:
        choice = self._choice(index, part.text)
        return self._chunk([{**choice, "logprobs": self._told(index, part.logprobs)}])

    def closing(self, index: int, answer: Answer, queue_seconds: float) -> dict[str, Any]:
        choice = self._choice(index, "", finish_reason(answer))
        return self._chunk([choice], timings=timings([answer], queue_seconds))

    def _choice(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    def _told(self, index: int, logprobs: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        told: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for t in logprobs:
            offset = self._offsets.get(index, 0)
            told["tokens"].append(t.text)
            told["token_logprobs"].append(t.logprob)
            told["top_logprobs"].append({other.text: other.logprob for other in t.top})
            told["text_offset"].append(offset)
            self._offsets[index] = offset + len(t.text)
        return told


def finish_reason(answer: Answer) -> str:
    """OpenAI's words: a full context is a length, too."""
    return "length" if answer.finish_reason == "context" else answer.finish_reason


def timings(answers: Sequence[Answer], queue_seconds: float) -> dict[str, float]:
    """Seconds: of the steps that the answers had a part in, and of waiting for others to end."""
    stats = [answer.stats for answer in answers]
    return {
        "queue_seconds": round(queue_seconds, 6),
        "encode_seconds": round(sum(s.encode_seconds for s in stats), 6),
        "prefill_seconds": round(sum(s.prefill_seconds for s in stats), 6),
        "decode_seconds": round(max(s.decode_seconds for s in stats), 6),
        "prefill_tokens_per_second": round(stats[0].prefill_tokens_per_second, 3),
        "decode_tokens_per_second": round(sum(s.decode_tokens_per_second for s in stats), 3),
    }


def event(data: dict[str, Any] | str) -> bytes:
    """Of an event stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode("utf-8", "replace")
