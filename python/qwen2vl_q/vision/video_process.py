"""A process that decodes the clip that its argument names, or that comes on stdin.

To stdout go a line, [frames, height, width], and the frames, RGB; or, where no frames are asked for, the time
of the last in seconds. What goes wrong is a line on stderr, "unsupported: ...", "damaged: ..." or "invalid:
..." (an argument), and the exit code 1; a "warning: ..." is none.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.vision.clip_files import Clip, open_clip
from qwen2vl_q.vision.video import (
    FPS,
    FRAME_FACTOR,
    VideoOptions,
    frame_count,
    frame_indices,
    plan,
    require_room,
    resized,
)

_MEMORY = 2**32


def main(question: dict[str, Any]) -> int:
    with suppress(AttributeError, OSError):  # Windows has none; tokens of answers go before it
        os.nice(5)
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with _source(question["path"]) as file:
            clip = open_clip(file)
            if question["frames"] is None:
                print(_times(clip)[-1])
            else:
                frames = question["frames"]
                _show(clip, _options(frames.pop("options")), **frames)
    except UnsupportedError as error:
        return _fail(f"unsupported: {error}")
    except FormatError as error:
        return _fail(f"damaged: {error}")
    except ValueError as error:
        return _fail(f"invalid: {error}")
    except (MemoryError, RuntimeError):
        return _fail(f"unsupported: it needs more than {_MEMORY // 2**30} GiB")
    return 0


def _options(given: dict[str, Any]) -> VideoOptions:
    return VideoOptions(**{**given, "resized": tuple(given["resized"]) if given["resized"] else None})


def _source(path: str | None) -> IO[bytes]:
    return io.BytesIO(sys.stdin.buffer.read()) if path is None else Path(path).open("rb")


def _times(clip: Clip) -> list[float]:
    times = clip.times()
    if not times:
        raise FormatError("no pictures in it")
    return times


def _show(clip: Clip, options: VideoOptions, factor: int, limit: int | None, budget: int | None) -> None:
    times = _times(clip)
    start, end = options.start or 0.0, math.inf if options.end is None else options.end
    within = [t for t in times if start <= t <= end]
    if not within:
        raise ValueError(f"no frames within {start:g} to {end:g} seconds; it has {times[-1]:.1f}")
    if len(within) == 1:
        within *= FRAME_FACTOR  # shown twice
    seconds = within[-1] - within[0]
    fps = (len(within) - 1) / seconds if seconds > 0 else FPS
    first = next(clip.pictures(within[:1]), None)
    if first is None:
        raise FormatError("none of its frames can be decoded")
    counts = range(frame_count(len(within), fps, options), 0, -FRAME_FACTOR)
    found = plan(*first.size, counts, factor, options, budget)
    require_room(found, factor, limit)
    output = sys.stdout.buffer
    output.write(f"[{found.count}, {found.height}, {found.width}]\n".encode())
    output.flush()
    shown = 0
    for picture in clip.pictures([within[i] for i in frame_indices(len(within), found.count)]):
        output.write(resized(picture, found).tobytes())
        output.flush()
        shown += 1
    if shown < found.count:
        clip.damage = f"{shown} of {found.count} frames are shown"
    if clip.damage:
        print(f"warning: it ends early or is damaged: {clip.damage}", file=sys.stderr)


def _fail(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
