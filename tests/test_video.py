"""Clips: which frames are shown, how large, and files that mean harm."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.vision.image_processor import ImageProcessor
from qwen2vl_q.vision.video import (
    TOTAL_PIXELS,
    VideoOptions,
    frame_count,
    frame_indices,
    frame_size,
    process_video,
    read_frames,
)

av = pytest.importorskip("av", reason="needs the extra video")


def grey(level: int, size: tuple[int, int]) -> Any:
    return np.full((size[1], size[0], 3), level, np.uint8)


def clip(n: int, fps: int = 10, size: tuple[int, int] = (64, 48), kind: str = "mp4") -> bytes:
    """Frames from black to white."""
    codecs = {"mp4": "libx264", "mov": "libx264", "matroska": "libx264", "webm": "libvpx", "avi": "mpeg4"}
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codecs[kind], rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(grey(i * 255 // max(1, n - 1), size), "rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def levels(pictures: list[Image.Image]) -> list[int]:
    return [int(np.asarray(picture).mean()) for picture in pictures]


@pytest.mark.parametrize(
    ("total", "fps", "options", "expected"),
    [
        (100, 10.0, {}, 20),
        (7, 10.0, {}, 4),
        (3, 10.0, {}, 2),
        (20_000, 30.0, {}, 768),
        (100, 10.0, {"fps": 1.0}, 10),
        (100, 10.0, {"max_frames": 7}, 6),
        (100, 10.0, {"min_frames": 31}, 32),
        (100, 10.0, {"nframes": 9}, 8),
        (101, 29.97, {}, 6),
    ],
)
def test_how_many_frames(total: int, fps: float, options: dict[str, Any], expected: int) -> None:
    assert frame_count(total, fps, VideoOptions(**options)) == expected


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert frame_indices(10, 4) == [0, 3, 6, 9]
    assert frame_indices(2, 2) == [0, 1]


def test_how_large() -> None:
    plain = VideoOptions()
    assert frame_size(1920, 1080, 4, 28, plain) == (560, 1008)  # 768 tokens at most
    assert math.prod(frame_size(1920, 1080, 200, 28, plain)) <= TOTAL_PIXELS / 200 * 2
    assert 100 * 784 < math.prod(frame_size(1920, 1080, 768, 28, plain)) <= 1.05 * 128 * 784
    assert math.prod(frame_size(20, 20, 4, 28, plain)) >= 128 * 784
    assert frame_size(300, 200, 4, 28, VideoOptions(resized=(56, 84))) == (56, 84)
    assert math.prod(frame_size(1920, 1080, 4, 28, VideoOptions(max_pixels=200 * 784))) <= 200 * 784


@pytest.mark.parametrize(
    "options",
    [
        {"fps": 0}, {"fps": -1}, {"fps": float("nan")}, {"fps": 1.0, "nframes": 4}, {"nframes": 1},
        {"start": -1.0}, {"start": 2.0, "end": 1.0}, {"max_frames": 0}, {"nframes": True},
    ],
)  # fmt: skip
def test_options_that_are_none(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        VideoOptions(**options)


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_files(kind: str) -> None:
    frames = read_frames(clip(40, kind=kind), VideoOptions())
    found = levels(frames.pictures)
    assert len(found) == 8
    assert found == sorted(found)
    assert found[0] < 12
    assert found[-1] > 240
    assert frames.seconds == pytest.approx([0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9])


def test_a_part_of_a_clip(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(clip(40))
    found = read_frames(path, VideoOptions(start=1.0, end=2.0)).pictures
    assert len(found) == 4
    assert all(55 < level < 140 for level in levels(found))
    with pytest.raises(ValueError, match="no frames within"):
        read_frames(path, VideoOptions(start=100.0))


def test_animations() -> None:
    frames = [Image.fromarray(grey(level, (64, 48))) for level in (0, 80, 160, 240)]
    for kind in ("GIF", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=500)
        found = levels(read_frames(file.getvalue(), VideoOptions(nframes=4)).pictures)
        assert found == pytest.approx([0, 80, 160, 240], abs=6), kind


def test_lists_of_frames_all_count() -> None:
    processor = ImageProcessor()
    for n in (1, 2, 3, 6):
        frames = [Image.fromarray(grey(40 * i, (64, 48))) for i in range(n)]
        video = process_video(frames, processor, VideoOptions(resized=(56, 56)))
        assert video.grid_thw == ((n + 1) // 2, 4, 4)
        assert video.pixels.shape == ((n + 1) // 2 * 2, 56, 56, 3)
        assert video.pixels[:, 0, 0, 0].tolist() == [40 * min(i, n - 1) for i in range((n + 1) // 2 * 2)]
    with pytest.raises(ValueError, match="one size"):
        read_frames([grey(1, (64, 48)), grey(1, (48, 64))], VideoOptions())
    with pytest.raises(ValueError, match="no frames"):
        read_frames([], VideoOptions())


def test_patches_are_of_two_frames() -> None:
    """The order of the reference: a patch's values by channel, frame, row, column."""
    rng = np.random.default_rng(1)
    processor = ImageProcessor(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    frames = [rng.integers(0, 256, (56, 84, 3), np.uint8) for _ in range(4)]
    video = process_video(list(frames), processor, VideoOptions(resized=(56, 84)))
    patches = processor.patchify(video).reshape(2, 2, 3, 2, 2, 3, 2, 14, 14)
    pixels = np.stack(frames).astype(np.float32) * np.float32(1 / 255)
    for t in range(2):
        for y, x in ((0, 0), (3, 5), (2, 1)):
            found = patches[t, y // 2, x // 2, y % 2, x % 2]
            expected = pixels[2 * t : 2 * t + 2, 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
            np.testing.assert_allclose(found, expected.transpose(3, 0, 1, 2), atol=1e-6)


def test_a_still_clip_is_its_picture(tiny: Qwen2VL) -> None:
    """Two frames alike are one step with the embeddings of the picture."""
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (56, 84, 3), np.uint8))
    still = tiny.encode_image(picture)
    video = process_video([picture, picture], tiny.image_processor, VideoOptions(resized=(56, 84)))
    np.testing.assert_allclose(tiny.encode_image(video), still, atol=1e-5)


def test_steps_do_not_see_each_other(tiny: Qwen2VL) -> None:
    rng = np.random.default_rng(3)
    frames = [rng.integers(0, 256, (56, 84, 3), np.uint8) for _ in range(4)]
    options = VideoOptions(resized=(56, 84))
    whole = tiny.encode_image(process_video(frames, tiny.image_processor, options))
    parts = [
        tiny.encode_image(process_video(frames[i : i + 2], tiny.image_processor, options)) for i in (0, 2)
    ]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)


def test_in_a_conversation(tiny: Qwen2VL) -> None:
    video = {"type": "video", "video": clip(40), "resized_height": 56, "resized_width": 84}
    image = {"type": "image", "image": grey(9, (56, 56))}
    ids, items = tiny.encode_chat(
        [{"role": "user", "content": [image, video, {"type": "text", "text": "a"}]}]
    )
    assert [item.is_video for item in items] == [False, True]
    assert items[1].grid_thw == (4, 4, 6)
    pads: Any = (tiny.config.image_token_id, tiny.config.video_token_id)
    assert [ids.count(pad) for pad in pads] == [4, 4 * 6]
    assert tiny.chat([{"role": "user", "content": [video]}], stream=False, max_new_tokens=3) is not None


@pytest.mark.parametrize(
    "data",
    [b"", b"not a video", clip(10)[:100], b"\x00\x00\x00\x20ftypisom" + bytes(500), b"RIFF" + bytes(99)],
)
def test_what_is_no_clip(data: bytes) -> None:
    with pytest.raises(FormatError):
        read_frames(data, VideoOptions())


def test_a_clip_that_ends_early() -> None:
    """What could be read is shown, with a warning."""
    data = clip(200, kind="matroska", size=(160, 120))
    with pytest.warns(UserWarning, match="ends early or is damaged"):
        found = read_frames(data[: len(data) * 2 // 3], VideoOptions(nframes=20))
    assert 2 <= len(found.pictures) <= 20


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="has room for 10"):
        process_video(clip(10), ImageProcessor(), VideoOptions(), 10)
