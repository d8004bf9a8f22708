"""What one request, and all of them, may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each has a default that is safe on a laptop; `qwen2vl-q serve --help` names the options."""

    body_bytes: int = 32 * 2**20
    images: int = 16  # of a request; a clip is one, a list of frames as many as it has
    pixels: int = 2**26  # of a picture before it is decoded
    video_seconds: float = 30.0  # that a clip may take to be decoded
    visual_tokens: int = 8192  # of a request
    prompt_tokens: int = 32768
    output_tokens: int = 8192  # that a request may ask for; 1,024 are drawn where it does not say
    answers: int = 16  # computed together; a request of n has n
    queued: int = 64  # requests that wait for others to end
    queue_bytes: int = 256 * 2**20  # of all bodies that are held
    seconds: float = 600.0  # of a request, its waiting included
    stop_seconds: float = 30.0  # that requests under way may go on when the server is asked to stop
