"""Pictures -> patches: sizes, layout, odd modes, hostile files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pictures import encoded, odd_modes, picture
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.vision import image_processor
from qwen2vl_q.vision.image_processor import (
    IMAGE_MEAN,
    IMAGE_STD,
    MAX_DECODED_PIXELS,
    MAX_PIXELS,
    MIN_PIXELS,
    ImageProcessor,
    load_image,
    preprocess,
    smart_resize,
)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((683, 1024), (MIN_PIXELS, MAX_PIXELS), (672, 1036)),
        ((28, 28), (MIN_PIXELS, MAX_PIXELS), (56, 56)),
        ((10, 1000), (MIN_PIXELS, MAX_PIXELS), (28, 560)),  # 0 x 1008 has too few pixels
        ((1000, 10), (MIN_PIXELS, MAX_PIXELS), (560, 28)),
        ((70, 98), (1, MAX_PIXELS), (56, 112)),  # 2.5 and 3.5 round to even
        ((5000, 5000), (MIN_PIXELS, MAX_PIXELS), (3556, 3556)),  # 3584 but for the rounding of the scale
        ((3000, 4000), (MIN_PIXELS, 100 * 784), (224, 308)),
        ((4000, 20), (MIN_PIXELS, 4 * 784), (784, 28)),  # a side is never 0, so this passes max_pixels
    ],
)
def test_smart_resize(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert smart_resize(*size, 28, *limits) == expected


@given(st.integers(1, 8000), st.integers(1, 8000))
@example(10, 2000)
def test_smart_resize_keeps_its_bounds(height: int, width: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio must not exceed 200"):
            smart_resize(height, width)
        return
    rows, columns = smart_resize(height, width)
    assert rows % 28 == 0 and columns % 28 == 0
    assert MIN_PIXELS <= rows * columns <= MAX_PIXELS


def naive_patches(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The definition, value by value: rows (gh/2, gw/2, 2, 2), columns channel, time, y, x."""
    grid_h, grid_w = pixels.shape[0] // 14, pixels.shape[1] // 14
    rows = []
    for block_row in range(0, grid_h, 2):
        for block_column in range(0, grid_w, 2):
            for r in range(block_row, block_row + 2):
                for c in range(block_column, block_column + 2):
                    patch = pixels[14 * r : 14 * r + 14, 14 * c : 14 * c + 14] / 255
                    channels = [(patch[:, :, k] - IMAGE_MEAN[k]) / IMAGE_STD[k] for k in range(3)]
                    rows.append(np.concatenate([v.ravel() for ch in channels for v in (ch, ch)]))
    return np.array(rows)


def test_layout_of_patches() -> None:
    image = Image.fromarray(picture(131, 77))
    patches, grid = preprocess(image)
    assert grid == (1, 6, 10)
    assert patches.dtype == np.float32
    assert patches.shape == (60, 1176)
    resized = np.asarray(image.resize((140, 84), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(patches, naive_patches(resized), rtol=0, atol=1e-6)


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def test_every_way_to_give_an_image(tmp_path: Path) -> None:
    array = picture(100, 60)
    image = Image.fromarray(array)
    (tmp_path / "p.png").write_bytes(encoded(image))
    expected, grid = preprocess(array)
    processed = ImageProcessor().process(image)
    at_its_end = io.BytesIO()
    image.save(at_its_end, "PNG")
    for source in (
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        encoded(image),
        bytearray(encoded(image)),
        memoryview(encoded(image)),
        at_its_end,
        Pipe(encoded(image)),
        image,
        array[:, :, :],
        np.concatenate([array, np.full_like(array[:, :, :1], 255)], axis=-1),
        processed,
    ):
        patches, found = preprocess(source)
        assert found == grid
        np.testing.assert_array_equal(patches, expected)
    np.testing.assert_array_equal(preprocess(array[:, ::-1])[0], preprocess(ImageOps.mirror(image))[0])


def test_grey_and_transparent_arrays() -> None:
    grey = picture(64, 48)[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=-1)
    for array in (grey, grey[:, :, None]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), expected)
    clear = np.dstack([expected, np.where(grey < 100, 0, 255).astype(np.uint8)])
    np.testing.assert_array_equal(
        np.asarray(load_image(clear)), np.where(grey[:, :, None] < 100, 255, expected)
    )


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_are_scaled(format: str) -> None:
    levels = np.tile(np.array([0, 128, 129, 257, 385, 386, 32896, 65406, 65407, 65535], np.uint16), (10, 1))
    loaded = np.asarray(load_image(encoded(Image.fromarray(levels), format)))
    assert loaded[0, :, 1].tolist() == [0, 0, 1, 1, 1, 2, 128, 254, 255, 255]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(Image.fromarray(levels[:5]), format, exif=exif)).size == (5, 10)


def test_a_transparent_level_of_sixteen_bits_is_white() -> None:
    levels = np.tile(np.array([0, 1000, 1001], np.uint16), (3, 1))
    data = encoded(Image.fromarray(levels))
    chunk = b"tRNS" + struct.pack(">H", 1000)
    at = data.index(b"IDAT") - 4
    loaded = load_image(
        data[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    )
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 255, 4]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype: type[np.generic]) -> None:
    image = Image.fromarray(np.arange(100).reshape(10, 10).astype(dtype))
    for source in (image, encoded(image, "TIFF")):
        with pytest.raises(UnsupportedError, match=r"or 16 of grey, found 32 \(mode [IF]\)"):
            load_image(source)


def test_files_that_are_no_binary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="binary mode"):
        load_image(io.StringIO("text"))  # type: ignore[arg-type]
    monkeypatch.setattr(image_processor, "MAX_STREAM_BYTES", 1000)
    with pytest.raises(UnsupportedError, match="a stream of more than 1000 bytes"):
        load_image(Pipe(b"x" * 1001))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    array = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {  # EXIF 2.32, 4.6.5: where row 0 and column 0 are
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: array.transpose(1, 0, 2)[:, ::-1],
        7: array.transpose(1, 0, 2)[::-1, ::-1],
        8: array.transpose(1, 0, 2)[::-1],
    }[orientation]
    loaded = load_image(encoded(Image.fromarray(array), exif=exif))
    np.testing.assert_array_equal(np.asarray(loaded), upright)


def test_transparency_is_composited_on_white() -> None:
    array = picture(64, 48)
    alpha = np.random.default_rng(1).integers(0, 256, (48, 64, 1), np.uint8)
    loaded = load_image(encoded(Image.fromarray(np.concatenate([array, alpha], axis=-1))))
    expected = array * (alpha / 255) + 255 * (1 - alpha / 255)
    assert np.abs(np.asarray(loaded) - expected).max() <= 1  # rounding in 8 bits


def test_a_transparent_palette_entry_is_white() -> None:
    palette = Image.fromarray(picture(64, 48)).quantize(8)
    loaded = np.asarray(load_image(encoded(palette, transparency=2)))
    assert (loaded[np.asarray(palette) == 2] == 255).all()
    opaque = np.asarray(palette) != 2
    np.testing.assert_array_equal(loaded[opaque], np.asarray(palette.convert("RGB"))[opaque])


@pytest.mark.parametrize("name", odd_modes())
def test_odd_modes_load_as_rgb(name: str) -> None:
    image = load_image(odd_modes()[name])
    assert image.mode == "RGB"
    assert image.size == ((90, 150) if "EXIF" in name else (150, 90))
    assert np.asarray(image).std() > 5


def test_bounds_decide_the_size() -> None:
    array = picture(400, 300)
    assert preprocess(array, max_pixels=20 * 784)[1] == (1, 6, 10)
    assert preprocess(array, min_pixels=400 * 784)[1] == (1, 36, 48)
    assert preprocess(array, 12 * 784, 12 * 784)[1] == (1, 6, 8)
    for bounds, match in (
        ((0, 10), "min_pixels: expected an integer of 1 to 134217728, found 0"),
        ((100, 99), "expected min_pixels <= max_pixels, found 100 and 99"),
        ((10**13, 10**13), "min_pixels: expected an integer of 1 to 134217728"),
        ((1, 10**5000), "max_pixels: expected an integer of 1 to 3288334336, found <int>"),
        ((1, True), "max_pixels: expected an integer"),
        ((1.5, 100), "min_pixels: expected an integer"),
    ):
        with pytest.raises(ValueError, match=match):
            preprocess(array, *bounds)


def test_too_many_tokens_are_refused_before_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = ImageProcessor(min_pixels=20 * 784)
    assert processor.process(picture(100, 60), max_tokens=24).grid_thw == (1, 8, 12)
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("resized"))
    match = r"an image of 100 x 60 takes 24 tokens \(168 x 112 pixels\), but the context has room for 23"
    with pytest.raises(ValueError, match=match):
        processor.process(picture(100, 60), max_tokens=23)


def test_large_jpeg_is_decoded_whole() -> None:
    """Decoders that scale a JPEG down while reading would give other pixels."""
    data = encoded(Image.fromarray(picture(1600, 1200)), "JPEG", quality=92)
    whole = Image.open(io.BytesIO(data)).convert("RGB").resize((280, 196), Image.Resampling.BICUBIC)
    processed = ImageProcessor(max_pixels=75 * 784).process(data)
    np.testing.assert_array_equal(processed.pixels, np.asarray(whole))


def test_key_knows_pixels_and_size() -> None:
    processor = ImageProcessor()
    array = picture(112, 56)
    key = processor.process(array).key
    assert key == processor.process(encoded(Image.fromarray(array))).key
    changed = array.copy()
    changed[0, 0, 0] ^= 1
    others = [changed, array.reshape(112, 56, 3)]  # other pixels; the same bytes in another shape
    assert len({key, *(processor.process(other).key for other in others)}) == 3


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("size", [(MAX_DECODED_PIXELS // 8192 + 1, 8192), (60000, 60000)])
def test_decompression_bombs_are_not_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match="pixels"):
        load_image(png_header(*size) + b"\0\0\0\0IDAT\0\0\0\0")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # Pillow's remarks on what it skips
def test_truncated_files(format: str, tmp_path: Path) -> None:
    data = encoded(Image.fromarray(picture(200, 150)), format)
    path = tmp_path / "cut"
    for length in (len(data) // 50, len(data) // 3, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="cut"):
            load_image(path)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_mutated_files_load_or_raise() -> None:
    rng = np.random.default_rng(5)
    files = [
        encoded(Image.fromarray(picture(40, 30)), f) for f in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
    ]
    refused = 0
    for i in range(300):
        data = bytearray(files[i % len(files)])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        try:
            assert load_image(bytes(data)).mode == "RGB"
        except (FormatError, UnsupportedError):
            refused += 1
    assert refused > 30


def test_what_is_not_an_image(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a picture")
    with pytest.raises(FormatError, match=r"notes\.txt: not an image \(expected PNG"):
        load_image(text)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        load_image(tmp_path / "missing.png")
    with pytest.raises(FormatError, match="not an image"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n")  # Pillow would run Ghostscript
    for array in (
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 3), np.int32),
        np.zeros((0, 4, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"must be uint8, .* \[height, width\] with 1, 3 or 4 channels"):
            load_image(array)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="found int"):
        load_image(3)  # type: ignore[arg-type]


def test_limits_and_statistics_of_a_file() -> None:
    keys = {
        "clip.vision.image_min_pixels": 784,
        "clip.vision.image_max_pixels": 78400,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.25, 0.5, 1.0],
    }
    processor = ImageProcessor.from_metadata(keys, "m.gguf")
    assert processor == ImageProcessor(784, 78400, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.5, 1.0))
    white = processor.patchify(processor.process(np.full((28, 28, 3), 255, np.uint8)))
    np.testing.assert_array_equal(white.reshape(4, 3, -1)[0, :, 0], [2, 1, 0.5])
    assert ImageProcessor.from_metadata({}, "m.gguf") == ImageProcessor()
    for key, bad in (
        ("clip.vision.image_min_pixels", 0),
        ("clip.vision.image_min_pixels", True),
        ("clip.vision.image_min_pixels", 78401),
        ("clip.vision.image_max_pixels", 2**32),
        ("clip.vision.image_std", [float("inf"), 1.0, 1.0]),
        ("clip.vision.image_mean", [float("nan"), 1.0, 1.0]),
        ("clip.vision.image_max_pixels", "many"),
        ("clip.vision.image_mean", [0.5]),
        ("clip.vision.image_std", [0.0, 1.0, 1.0]),
    ):
        with pytest.raises(FormatError, match=r"m\.gguf: clip\.vision"):
            ImageProcessor.from_metadata({**keys, key: bad}, "m.gguf")


# --- transformers ---


def reference_preprocess(image: Image.Image) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    pytest.importorskip("transformers", reason="needs the parity extra")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    batch = processor(image, return_tensors="np")
    return batch["pixel_values"], tuple(batch["image_grid_thw"][0].tolist())


@pytest.mark.parity
@pytest.mark.slow
def test_300_random_sizes_equal_transformers() -> None:
    rng = np.random.default_rng(0)
    # Uniform in the logarithm, so that small pictures, where rounding matters most, are as frequent as large.
    widths = np.exp(rng.uniform(np.log(10), np.log(3001), 300)).astype(int).tolist()
    heights = np.exp(rng.uniform(np.log(10), np.log(2001), 300)).astype(int).tolist()
    whole = rng.integers(0, 256, (2000, 3000, 3), np.uint8)
    compared = 0
    for width, height in zip([3000, *widths[1:]], [2000, *heights[1:]], strict=True):
        image = Image.fromarray(whole[:height, :width])
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ValueError, match="aspect ratio"):
                preprocess(image)
            continue
        expected, grid = reference_preprocess(image)
        patches, found = preprocess(image)
        assert found == grid, (width, height)
        assert np.abs(patches - expected).max() <= 1e-6, (width, height)
        compared += 1
    assert compared > 280


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in odd_modes() if "16 bits" not in name])
def test_odd_modes_equal_transformers(name: str) -> None:
    data = odd_modes()[name]
    # transformers applies EXIF where it opens a file itself (image_utils.load_image).
    expected, grid = reference_preprocess(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    patches, found = preprocess(data)
    assert found == grid
    assert np.abs(patches - expected).max() <= 1e-6


def test_a_size_is_come_near_to() -> None:
    """As qwen-vl-utils: smart_resize of the size asked for, whatever the picture's own."""
    processor = ImageProcessor(min_pixels=4 * 784, max_pixels=100 * 784)
    for size, grid in (
        ((280, 140), (20, 10)),
        ((290, 139), (20, 10)),
        ((2800, 2800), (20, 20)),
        ((1, 1), (4, 4)),
    ):
        assert processor.process(picture(60, 300), size=size).grid_thw == (1, *grid)
    with pytest.raises(ValueError, match="aspect ratio"):
        processor.process(picture(60, 60), size=(1, 1000))
