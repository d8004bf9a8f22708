"""What a call took: counts, seconds, bytes."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

# "": not finished; "stop": an end-of-turn token or a stop string; "length": max_new_tokens; "context": n_ctx.
FinishReason: TypeAlias = Literal["", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationStats:
    """One call of `generate` or `chat`, as far as it has come.

    Seconds are the clock's, of the steps and slices that the call had a part in: what it shares with others
    counts in full for each. So a call's own add up to the time that it was computed, those of several calls
    do not; of what they do together, the clock around them tells.
    """

    image_tokens: int = 0  # of the images that had to be encoded
    encode_seconds: float = 0.0
    prompt_tokens: int = 0  # in all
    prompt_image_tokens: int = 0  # of these, images'
    reused_tokens: int = 0  # of these, found in the KV cache
    prefill_seconds: float = 0.0
    generated_tokens: int = 0
    guessed_tokens: int = 0  # computed before they were drawn
    confirmed_tokens: int = 0  # of these, drawn
    decode_seconds: float = (
        0.0  # evaluating and drawing; neither the caller's time between tokens nor others'
    )
    finish_reason: FinishReason = ""
    kv_bytes: int = 0  # KV cache pages in use
    peak_memory_bytes: int | None = None  # of the process; None where the system does not say

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.prompt_tokens - self.reused_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """The first token comes out of the prefill and does not count."""
        return _rate(max(self.generated_tokens - 1, 0), self.decode_seconds)


@dataclass(frozen=True)
class Stage:
    """What a part of a forward pass took, and what it had to do at least (a multiply and an add are two)."""

    name: str  # "text ..." or "image ..."
    calls: float  # a mean over runs need not be whole
    seconds: float
    int8_ops: float
    float_ops: float
    bytes: float

    @property
    def is_attention(self) -> bool:
        return self.name.endswith(" attention")


def peak_memory_bytes() -> int | None:
    """The most physical memory that this process has held; None on systems without getrusage."""
    if sys.platform == "win32":
        return None
    import resource

    # Linux hands getrusage's figure on to whatever a process starts, so the kernel's own note comes first.
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
