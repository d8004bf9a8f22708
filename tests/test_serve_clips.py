"""Clips over the server: answered, bounded, and in nobody's way."""

from __future__ import annotations

import base64
import io
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from PIL import Image

from demo import cases
from demo.cases import Case
from films import fade
from qwen2vl_q.serve.limits import Limits
from serving import Serving, data_uri, serving

CHAT = "/v1/chat/completions"
FIRST_SEED = 2_000_000
SMALL = Limits(images=4, pixels=10**6, visual_tokens=60, video_seconds=10.0)


@pytest.fixture(scope="module")
def served() -> Iterator[Serving]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def small() -> Iterator[Serving]:
    with serving(limits=SMALL) as found:
        yield found


def uri(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def frames_of(case: Case) -> list[Image.Image]:
    return [Image.open(io.BytesIO(png)).convert("RGB") for png in case.images]


def gif(frames: Sequence[Image.Image]) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    return file.getvalue()


def asking(part: dict[str, Any], question: str = "What happens?", **more: Any) -> dict[str, Any]:
    content = [part, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, **more}


def answered(served: Serving, body: dict[str, Any]) -> tuple[str, int]:
    """The answer, and how many tokens the clip took."""
    status, answer = served.ask(CHAT, body)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens_details"][
        "image_tokens"
    ]


def refusal(served: Serving, part: dict[str, Any]) -> str:
    status, answer = served.ask(CHAT, asking(part))
    assert status == 400, answer
    message: str = answer["error"]["message"]
    return message


def test_right_answers_of_files_and_of_frames(served: Serving) -> None:
    """As a file by its address and as frames; both are the same clip."""
    right = 0
    for k in range(6):
        case = cases.case("move", FIRST_SEED + k)
        frames, question = frames_of(case), case.turns[0].question
        size = {"max_pixels": 140 * 140}
        file = {
            "type": "video_url",
            "video_url": {"url": uri(gif(frames), "image/gif")},
            "nframes": len(frames),
        }
        listed = {"type": "video", "video": [data_uri(frame) for frame in frames]}
        answers = [answered(served, asking({**part, **size}, question)) for part in (file, listed)]
        assert answers[0][1] == answers[1][1] > 0
        right += sum(cases.right(case.turns[-1], text) for text, _ in answers)
    assert right >= 11


def test_a_film_is_answered_as_the_library_does(served: Serving) -> None:
    pytest.importorskip("av", reason="needs the extra video")
    film = fade(8)
    body = asking({"type": "video_url", "video_url": uri(film), "fps": 4}, max_tokens=8)
    text, tokens = answered(served, body)
    part = {"type": "video", "video": film, "fps": 4}
    messages = asking(part)["messages"]
    assert text == served.model.chat(messages, stream=False, temperature=0, max_new_tokens=8)
    prompt = served.model.encode_chat(messages)[0]
    pad = served.model.config.video_token_id
    assert pad is not None and tokens == prompt.count(pad) > 0
    status, answer = served.ask("/tokenize", {"messages": body["messages"]})
    assert (status, answer["tokens"]) == (200, prompt)


def test_a_clip_is_fitted_into_what_a_request_may_take(small: Serving) -> None:
    frames = [Image.new("RGB", (560, 560), (i * 60, 0, 0)) for i in range(4)]
    _, tokens = answered(small, asking({"type": "video", "video": list(map(data_uri, frames))}, max_tokens=1))
    assert 30 < tokens <= 60


def test_what_is_refused(small: Serving, tmp_path: Path) -> None:
    clip = tmp_path / "clip.gif"
    clip.write_bytes(gif([Image.new("RGB", (56, 56), (i * 60, 0, 0)) for i in range(3)]))
    tile, large = data_uri(Image.new("RGB", (56, 56))), data_uri(Image.new("L", (1200, 1000)))
    for part, message in (
        ({"type": "video", "video": [tile] * 5}, "expected at most 4 pictures, found 5"),
        ({"type": "video", "video": [tile, large]}, "frame 1: expected at most 1000000 pixels, found 1200"),
        ({"type": "video", "video": [tile, str(clip)]}, "part 0, frame 1: expected a data: URI"),
        ({"type": "video", "video": str(clip)}, "part 0: expected a data: URI"),
        ({"type": "video_url", "video_url": {"url": f"file://{clip}"}}, "part 0: expected a data: URI"),
        ({"type": "video_url", "video_url": {"url": "https://localhost/a.mp4"}}, "fetches nothing"),
        ({"type": "video_url", "video_url": {}}, "expected video_url with a url"),
        (
            {"type": "video_url", "video_url": {"url": tile, "detail": "low"}},
            "video_url: unknown key detail",
        ),
        ({"type": "video", "video": [tile] * 2, "fps": "fast"}, "fps: expected a number"),
        ({"type": "video", "video": [tile] * 2, "total_pixels": "all"}, "total_pixels: expected"),
        ({"type": "video", "video": []}, "message 0, part 0: a video of no frames"),
        ({"type": "video", "video": 7}, "part 0: expected a clip's path"),
        ({"type": "input_video", "video": tile}, "expected the type text"),
    ):
        assert message in refusal(small, part), part


def test_bytes_that_are_no_clip(small: Serving) -> None:
    pytest.importorskip("av", reason="needs the extra video")
    found = refusal(small, {"type": "video", "video": uri(b"not a clip" * 100)})
    assert found.startswith("message 0, part 0: the video: not a video")


def test_decoding_has_its_time_and_keeps_nobody(small: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that hangs and reads nothing: pictures are answered meanwhile, clips one after the other."""
    sleeping = ["-c", "import time; time.sleep(60)", ""]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: popen([command[0], *sleeping], **how))
    limits = Limits(video_seconds=1.0)
    with serving(small.model, limits=limits) as hanging, ThreadPoolExecutor(2) as pool:
        begin = monotonic()
        clips = [
            pool.submit(refusal, hanging, {"type": "video", "video": uri(bytes(2**20))}) for _ in range(2)
        ]
        sleep(0.2)
        picture = {"type": "image_url", "image_url": {"url": data_uri(Image.new("RGB", (56, 56)))}}
        assert answered(hanging, asking(picture, max_tokens=1))[1] > 0
        assert monotonic() < begin + 1
        for clip in clips:
            assert "the video: not decoded within 1 seconds" in clip.result()
        assert 2 <= monotonic() - begin < 10
