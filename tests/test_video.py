"""Clips: which frames are shown, how large, and files that mean harm."""

from __future__ import annotations

import io
import math
import os
import random
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from films import encoded, fade, grey
from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.vision import video_decoder
from qwen2vl_q.vision.clip_files import _Film
from qwen2vl_q.vision.image_processor import ImageProcessor
from qwen2vl_q.vision.video import (
    TOTAL_PIXELS,
    Plan,
    VideoOptions,
    frame_count,
    frame_indices,
    frame_size,
    plan,
    process_video,
)

pytest.importorskip("av", reason="needs the extra video")


def levels(video: Any, **options: Any) -> list[int]:
    """The mean of each frame that is shown."""
    shown = process_video(video, ImageProcessor(), VideoOptions(**options))
    return [int(frame.mean()) for frame in shown.pixels]


@pytest.mark.parametrize(
    ("total", "fps", "options", "expected"),
    [
        (100, 10.0, {}, 20),
        (7, 10.0, {}, 4),
        (3, 10.0, {}, 2),
        (20_000, 30.0, {}, 768),
        (100, 10.0, {"fps": 1.0}, 10),
        (40, 39 / 3.8999999999999995, {}, 8),
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


def test_a_budget_takes_pixels_then_frames() -> None:
    def planned(budget: int | None, **options: Any) -> Plan:
        return plan(640, 480, range(66, 0, -2), 28, VideoOptions(**options), budget)

    whole = planned(None)
    assert (whole.count, whole.tokens(28)) == (66, 33 * 17 * 23)
    smaller = planned(8000)
    assert smaller.count == 66 and 7000 < smaller.tokens(28) <= 8000
    fewer = planned(2000)
    assert fewer.count < 40 and 1700 < fewer.tokens(28) <= 2000
    assert planned(50).count == 2 and 30 < planned(50).tokens(28) <= 50
    assert plan(640, 480, [66], 28, VideoOptions(), 500).count == 66
    assert planned(2000, resized=(280, 280)).tokens(28) == 2000


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "webm", "avi"])
def test_files(kind: str) -> None:
    found = levels(fade(40, kind=kind))
    assert found == pytest.approx([i * 255 / 39 for i in (0, 6, 11, 17, 22, 28, 33, 39)], abs=6)


def test_far_frames_are_sought_and_the_same() -> None:
    """More than one keyframe: what lies between is not decoded, and what is shown is what is there."""
    data = fade(1200, fps=25)
    assert levels(data, nframes=6) == pytest.approx([0, 51, 102, 153, 204, 255], abs=4)
    assert levels(data, nframes=2, start=47.0) == pytest.approx([47 * 25 * 255 / 1199, 255], abs=4)


def test_what_lies_between_keyframes_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    frames_of = _Film._frames

    def counted(self: _Film, *arguments: Any) -> Any:
        nonlocal decoded
        for found in frames_of(self, *arguments):
            decoded += 1
            yield found

    monkeypatch.setattr(_Film, "_frames", counted)
    film = _Film(io.BytesIO(fade(1200, fps=25)))
    times = film.times()
    assert len(list(film.pictures([times[i] for i in (0, 600, 1199)]))) == 3
    assert decoded < 600


def test_frames_that_last_differently() -> None:
    """By time of the file, not by an assumed rate: as many frames a second as asked."""
    times = [0, 1, 2, 3, 4, 5, 30, 31, 60, 90]  # tenths of a second
    file = encoded([grey(i * 28) for i in range(10)], kind="matroska", times=times)
    assert levels(file, nframes=10) == pytest.approx([i * 28 for i in range(10)], abs=5)
    assert levels(file, start=2.9, end=3.2, nframes=2) == pytest.approx([6 * 28, 7 * 28], abs=5)


def turned(data: bytes) -> bytes:
    """An mp4's picture track with the matrix of a phone held upright: a quarter to the right."""
    unit = b"\x00\x01\x00\x00" + bytes(12) + b"\x00\x01\x00\x00" + bytes(12) + b"\x40\x00\x00\x00"
    quarter = (
        bytes(4) + b"\x00\x01\x00\x00" + bytes(4) + b"\xff\xff\x00\x00" + bytes(16) + b"\x40\x00\x00\x00"
    )
    at = data.index(unit, data.index(b"tkhd"))
    return data[:at] + quarter + data[at + len(unit) :]


def test_what_a_phone_has_turned() -> None:
    pixels = grey(0, (96, 64))
    pixels[:, :24] = 255  # its left becomes the top
    shown = process_video(turned(encoded([pixels] * 4)), ImageProcessor(), VideoOptions(nframes=2)).pixels
    count, height, width, _ = shown.shape
    assert count == 2 and height > width
    assert shown[0, : height // 8].mean() > 240 and shown[0, height // 2 :].mean() < 10


def test_a_part_of_a_clip(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(fade(40))
    found = levels(path, start=1.0, end=2.0)
    assert len(found) == 4
    assert all(55 < level < 140 for level in found)
    with pytest.raises(ValueError, match=r"a\.mp4: no frames within"):
        levels(path, start=100.0)
    with pytest.raises(FileNotFoundError):
        levels(tmp_path / "b.mp4")


def test_animations() -> None:
    frames = [Image.fromarray(grey(level)) for level in (0, 80, 160, 240)]
    for kind in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=500)
        assert levels(file.getvalue(), nframes=4) == pytest.approx([0, 80, 160, 240], abs=6), kind
        file.seek(0)
        assert levels(file, start=0.9) == pytest.approx([160, 240], abs=6), kind


def test_lists_of_frames_all_count() -> None:
    processor = ImageProcessor()
    for n in (1, 2, 3, 6):
        frames = [Image.fromarray(grey(40 * i)) for i in range(n)]
        video = process_video(frames, processor, VideoOptions(resized=(56, 56)))
        assert video.grid_thw == ((n + 1) // 2, 4, 4)
        assert video.pixels.shape == ((n + 1) // 2 * 2, 56, 56, 3)
        assert video.pixels[:, 0, 0, 0].tolist() == [40 * min(i, n - 1) for i in range((n + 1) // 2 * 2)]
    with pytest.raises(ValueError, match="one size"):
        levels([grey(1, (64, 48)), grey(1, (48, 64))])
    with pytest.raises(ValueError, match="no frames"):
        levels([])


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
    video = {"type": "video", "video": fade(40), "resized_height": 56, "resized_width": 84}
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
    [
        b"", b"not a video", fade(10)[:100], b"\x00\x00\x00\x20ftypisom" + bytes(500), b"RIFF" + bytes(99),
        b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
    ],
)  # fmt: skip
def test_what_is_no_clip(data: bytes) -> None:
    """Playlists, which name other files and hosts, among it."""
    with pytest.raises(FormatError, match="the video: not a video"):
        levels(data)


@pytest.mark.parametrize(
    "playlist", ["#EXTM3U\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"]
)
def test_playlists_open_no_other_file(playlist: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ts").write_bytes(fade(40, kind="mpegts"))
    assert len(levels(tmp_path / "a.ts")) == 8
    monkeypatch.chdir(tmp_path)
    for name in ("a.ts", f"{tmp_path}/a.ts"):
        (tmp_path / "list.m3u8").write_text(playlist.format(name))
        for source in (tmp_path / "list.m3u8", playlist.format(name).encode()):
            with pytest.raises(FormatError, match="not a video"):
                levels(source)


def test_a_clip_that_ends_early() -> None:
    """What could be read is shown, with a warning."""
    data = fade(200, kind="matroska", size=(160, 120))
    with pytest.warns(UserWarning, match="ends early or is damaged"):
        found = levels(data[: len(data) * 2 // 3], nframes=20)
    assert 2 <= len(found) <= 20 and len(found) % 2 == 0
    assert found == sorted(found)


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match="room for 10"):
        process_video(fade(10), ImageProcessor(), VideoOptions(), 10)


# --- files that mean harm ---


def patched(data: bytes, box: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(box) + offset
    return data[:at] + value + data[at + len(value) :]


def test_a_clip_that_claims_a_billion_frames() -> None:
    """What is there is shown, or it is refused: nothing is made room for."""
    billion = struct.pack(">I", 10**9)
    for box, offset in ((b"stts", 12), (b"stsz", 12)):
        try:
            assert len(levels(patched(fade(40), box, offset, billion))) <= 768
        except (FormatError, UnsupportedError) as error:
            assert str(error).startswith("the video: ")


def test_frames_that_are_too_large() -> None:
    """Headers tell, and nothing is decoded."""
    with pytest.raises(UnsupportedError, match="67108864 pixels at most, found 16000 x 16000"):
        levels(b"YUV4MPEG2 W16000 H16000 F25:1\nFRAME\n")
    file = io.BytesIO()
    frames = [Image.fromarray(grey(level)) for level in (0, 80)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises((UnsupportedError, FormatError)):
        levels(patched(file.getvalue(), b"GIF8", 6, struct.pack("<HH", 60_000, 60_000)))


def test_a_decoder_that_does_not_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_decoder, "SECONDS_A_FRAME", 0.01)
    with pytest.raises(UnsupportedError, match=r"no frame within 0\.01 seconds"):
        levels(fade(40))


def test_a_decoder_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedError, match="its decoder has failed"):
        levels(fade(40))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=path.name):
            levels(path)


def test_damaged_clips_end_in_a_word() -> None:
    """Bytes changed here and there: frames, or an error of ours."""
    rng = random.Random(1)
    for kind in ("mp4", "webm"):
        data = bytearray(fade(20, kind=kind))
        for _ in range(6):
            broken = data.copy()
            for _ in range(20):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    levels(bytes(broken))
                except (FormatError, UnsupportedError, ValueError) as error:
                    assert str(error).startswith("the video: ")
