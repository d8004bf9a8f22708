"""The packaged model's clips through files, as users have them: encoded, decoded, sampled, answered."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import Run
from demo import cases
from demo.cases import Case
from films import encoded
from qwen2vl_q import DEMO_MODEL, Qwen2VL

pytest.importorskip("av", reason="needs the extra video")

FIRST_SEED = 2_000_000
CASES = 12


def frames(case: Case) -> list[Image.Image]:
    """In even sizes, which codecs want."""
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in case.images]
    width, height = (side // 2 * 2 for side in pictures[0].size)
    return [picture.resize((width, height), Image.Resampling.BICUBIC) for picture in pictures]


def film(case: Case, path: Path) -> Path:
    shown = frames(case)
    if path.suffix == ".gif":
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=500)
    else:
        path.write_bytes(encoded([np.asarray(frame) for frame in shown], fps=2))
    return path


@pytest.mark.parametrize(
    ("task", "suffix"),
    # Pillow writes frames that are alike as one, so an order of two things would have two frames.
    [("move", ".mp4"), ("move", ".gif"), ("order", ".mp4"), ("bounce", ".mp4"), ("bounce", ".gif")],
)
def test_right_answers_about_films(task: str, suffix: str, tmp_path: Path) -> None:
    """Nearly all: codecs take colours away."""
    right = 0
    with Qwen2VL.from_gguf(DEMO_MODEL) as model:
        for k in range(CASES):
            case = cases.case(task, FIRST_SEED + k)
            path = film(case, tmp_path / f"{k}{suffix}")
            part = {"type": "video", "video": path, "nframes": len(case.images), "max_pixels": 140 * 140}
            content = [part, {"type": "text", "text": case.turns[0].question}]
            answer = model.chat([{"role": "user", "content": content}], stream=False, temperature=0)
            right += cases.right(case.turns[-1], answer)
    assert right >= CASES - 2


def test_the_command_line_tells_which_way(run: Run, tmp_path: Path) -> None:
    case = cases.case("move", FIRST_SEED)
    path = film(case, tmp_path / "film.mp4")
    asked = ["--video", path, "--max-pixels", 140 * 140, "-p", case.turns[0].question]
    code, out, _ = run("chat", *map(str, asked))
    assert (code, out) == (0, f"{case.turns[0].answer}\n")
