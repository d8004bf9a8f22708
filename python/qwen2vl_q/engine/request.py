"""What one caller wants of the scheduler, and how far it has come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.base.printable import printable
from qwen2vl_q.engine.guessing import Guessing
from qwen2vl_q.engine.pictures import Encoding
from qwen2vl_q.engine.stats import FinishReason, GenerationStats, peak_memory_bytes
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.vision.image_processor import ProcessedImage

# Called with a stage ("load", "image", "prefill") and how far it is, at most every 50 ms. An exception
# raised in it cancels the call.
Progress: TypeAlias = "Callable[[str, int, int], None]"
# Of the token that was drawn, and of the likeliest by their ids: `SequenceState.log_probabilities`.
LogProbabilities: TypeAlias = "tuple[float, list[tuple[int, float]]]"

_AHEAD = 8  # tokens of a stream that wait for whoever reads it; then the others go on without it


@runtime_checkable
class Constraint(Protocol):
    """What may be said next, token by token. Another thread than the caller's may ask; what it raises ends
    the call. It must not use the model."""

    def allowed(self) -> NDArray[np.uint8] | NDArray[np.bool_] | None:
        """[vocab_size], 0 for tokens that must not be drawn next; None: all may. An answer ends with one of
        `config.eos_token_ids`."""

    def accept(self, token: int) -> None:
        """It has been drawn."""

    # A constraint may have `forced() -> Sequence[int]` too: tokens that will come next if any can be told.
    # They are computed in one step; which tokens come is for allowed() to say as ever.


def require_constraint(constraint: Any) -> None:
    """ValueError for what is none; None is no constraint."""
    if not isinstance(constraint, Constraint | None):
        found = printable(constraint)
        raise ValueError(f"constraint: expected an object with allowed() and accept(), found {found}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prompt, checked against model and context."""

    prompt: _native.Prompt
    images: list[ProcessedImage]


class Drawn(NamedTuple):
    """A token, and the text that it makes certain."""

    token: int
    text: str
    scored: LogProbabilities | None


class Request:
    """One answer on its way: tokens come to it from whichever thread takes the steps."""

    def __init__(
        self,
        prepared: Prepared,
        sampler: _native.Sampler,
        limit: int,
        cut: FinishReason,
        text: TextStream,
        progress: Progress | None = None,
        constraint: Constraint | None = None,
        top_logprobs: int | None = None,
        most_guessed: int = 0,
    ) -> None:
        """limit: tokens at most; cut: the reason of the end where they are reached. text: tells which token
        is the last. progress, constraint: called on the thread that takes the step. top_logprobs: of so many
        tokens log-probabilities are told beside the drawn one's; None: of none. most_guessed: tokens that may
        be computed before they are drawn."""
        self.prepared = prepared
        self.sampler = sampler
        self.limit = limit
        self.cut: FinishReason = cut
        self.text = text
        self.progress = progress
        self.constraint = constraint
        self.top_logprobs = top_logprobs
        self.guessing = Guessing(most_guessed)
        self.ahead = _AHEAD  # tokens that may wait here
        self.submitted = False
        self.over = False  # nothing more will be computed
        self.error: BaseException | None = None
        self.tokens: deque[Drawn] = deque()
        self.state: _native.SequenceState | None = None
        self.pictures: list[Encoding] = []  # until its prompt has begun
        self.found = 0  # of them, the first: their cells were there
        self.begun = False  # its prompt waits, or has been computed
        self.decoding = False  # its prompt has been computed
        self.history: list[int] = []  # tokens drawn
        self.fed = 0  # of them, the first: their cells wait, or have been computed
        # GenerationStats
        self.image_tokens = self.reused_tokens = 0
        self.encode_seconds = self.prefill_seconds = self.decode_seconds = 0.0
        self.finish_reason: FinishReason = ""

    @property
    def ready(self) -> bool:
        return bool(self.tokens) or self.over

    @property
    def stalled(self) -> bool:
        return len(self.tokens) >= self.ahead

    @property
    def drawn(self) -> int:
        return len(self.history)

    @property
    def next_picture(self) -> int | None:
        """The first of its images that has to be encoded before its prompt can begin."""
        for i in range(self.found, len(self.pictures)):
            if self.pictures[i].embeddings is None:
                return i
        return None

    @property
    def live(self) -> _native.SequenceState:
        """Its cells, as long as it is under way."""
        assert self.state is not None
        return self.state

    def forced(self) -> Sequence[int]:
        """What the constraint leaves no choice about."""
        forced: Callable[[], Sequence[int]] | None = getattr(self.constraint, "forced", None)
        return () if forced is None else forced()

    def take(self) -> Drawn | None:
        """The next token, None at the end; the error that has ended it. Only when ready."""
        if self.tokens:
            return self.tokens.popleft()
        if self.error is not None:
            raise self.error
        return None

    def restart(self) -> None:
        """Gives its cells back. Those of its prompt and of what it has drawn will be computed once more."""
        self.state = None
        self.begun = self.decoding = False
        self.fed = 0

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.over = True

    def stats(self, kv_bytes: int) -> GenerationStats:
        return GenerationStats(
            image_tokens=self.image_tokens,
            encode_seconds=self.encode_seconds,
            prompt_tokens=len(self.prepared.prompt),
            prompt_image_tokens=sum(end - first for first, end in self.prepared.prompt.runs),
            reused_tokens=self.reused_tokens,
            prefill_seconds=self.prefill_seconds,
            generated_tokens=self.drawn,
            guessed_tokens=self.guessing.guessed,
            confirmed_tokens=self.guessing.confirmed,
            decode_seconds=self.decode_seconds,
            finish_reason=self.finish_reason,
            kv_bytes=kv_bytes,
            peak_memory_bytes=peak_memory_bytes(),
        )
