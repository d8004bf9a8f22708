"""Pictures -> the vision tower's input, as transformers' Qwen2VLImageProcessor makes it."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable

# The released preprocessor_config.json: 4 to 16,384 visual tokens.
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 16384 * 28 * 28
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200
MAX_BOUND = 2**24 * 14 * 14  # of what max_pixels may say: as many patches

# What is decoded, and what a picture may be enlarged to (min_pixels): 2**27 pixels are 0.4 GB as RGB, and
# pass every camera short of 200 megapixels.
MAX_DECODED_PIXELS = 2**27
MAX_STREAM_BYTES = 2**29  # of a stream that cannot seek, which is read whole
# Formats with maintained decoders; the rest of Pillow's list is attack surface for files from the net.
FORMATS: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
try:
    from PIL import AvifImagePlugin  # since Pillow 11.3, where it was built with libavif
except ImportError:
    pass
else:
    FORMATS += ("AVIF",) if AvifImagePlugin.SUPPORTED else ()

_ORIENTATION_TAG = 0x0112  # EXIF; 1 is upright


@dataclass(frozen=True, eq=False)
class ProcessedImage:
    """A picture at the size that the vision tower sees it, or a clip."""

    # RGB [grid_h * patch_size, grid_w * patch_size, 3]; of a clip [grid_t * temporal_patch_size, ...]
    pixels: NDArray[np.uint8]
    grid_thw: tuple[int, int, int]  # in patches
    key: bytes  # 128-bit hash of the size and the pixels: equal keys, equal embeddings

    @property
    def is_video(self) -> bool:
        return self.pixels.ndim == 4


EncodedImage: TypeAlias = "str | PathLike[str] | bytes | bytearray | memoryview | IO[bytes]"
Picture: TypeAlias = "EncodedImage | Image.Image | NDArray[np.uint8]"
ImageInput: TypeAlias = "Picture | ProcessedImage"


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, near the given, with `min_pixels` to `max_pixels` in all.

    ValueError for a side without pixels or an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {width} x {height} has no pixels")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"the image's aspect ratio must not exceed {MAX_ASPECT_RATIO}, but {width} x {height} "
            f"is {max(height, width) / min(height, width):.0f}"
        )
    # Python's round goes half to even, as the reference does.
    rows = round(height / factor) * factor
    columns = round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:  # also a side that rounded to 0
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def require_image(image: Any) -> None:
    """ValueError for what is not of ImageInput's types."""
    known = (str, PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, ProcessedImage)
    if not isinstance(image, known) and not callable(getattr(image, "read", None)):
        raise ValueError(
            "expected a path, bytes, a binary file, a PIL image or a uint8 array, "
            f"found {printable(type(image).__name__)}"
        )


def load_image(image: Picture) -> Image.Image:
    """An upright RGB picture from a path, an encoded file's bytes, a binary file, a Pillow image, or an array
    of uint8, or of floats from 0 to 1, [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] (with alpha).

    EXIF orientation is applied and transparency composited on white; of an animation, the first frame counts.
    16 bits of grey are scaled to 8, where transformers cuts them off at 255; other pixels of more than 8 bits
    (Pillow's modes I and F) have no known white and are refused.

    Raises OSError for a file that cannot be read, FormatError for one that is not a picture or is damaged,
    UnsupportedError above MAX_DECODED_PIXELS or for such pixels, ValueError for an array of another shape or
    type.
    """
    require_image(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the image")
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), "the image")
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(image), f"the image ({memoryview(image).nbytes} bytes)")
    if isinstance(image, (str, PathLike)):
        with Path(image).open("rb") as file, io.BufferedReader(file) as reader:
            return _decode(reader, printable(fspath(image), 1000))
    return _decode(_seekable(image), printable(getattr(image, "name", "the image")))


@dataclass(frozen=True)
class ImageProcessor:
    """The preprocessing of one model file."""

    min_pixels: int = MIN_PIXELS
    max_pixels: int = MAX_PIXELS
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD

    def __post_init__(self) -> None:
        for name, most in (
            ("min_pixels", MAX_DECODED_PIXELS),
            ("max_pixels", MAX_BOUND),
        ):
            integer(name, getattr(self, name), 1, most)
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"expected min_pixels <= max_pixels, found {self.min_pixels} and {self.max_pixels}"
            )
        statistics = (*self.image_mean, *self.image_std)
        if (
            len(self.image_mean) != 3
            or len(self.image_std) != 3
            or not all(map(math.isfinite, statistics))
            or min(self.image_std) <= 0
        ):
            raise ValueError(
                "expected three means and three positive deviations, "
                f"found {printable(self.image_mean)} and {printable(self.image_std)}"
            )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str) -> ImageProcessor:
        """From the `clip.vision.*` keys, the released defaults for missing ones. FormatError, naming file and
        key, for values out of range."""
        found: dict[str, Any] = {}
        for name in ("min_pixels", "max_pixels"):
            pixels = metadata.get(f"clip.vision.image_{name}")
            if pixels is not None:
                found[name] = pixels
        for name in ("image_mean", "image_std"):
            channels = metadata.get(f"clip.vision.{name}")
            if channels is not None:
                if not isinstance(channels, list) or not all(isinstance(value, float) for value in channels):
                    raise FormatError(
                        f"{path}: clip.vision.{name}: expected numbers, found {printable(channels)}"
                    )
                found[name] = tuple(channels)
        try:
            return cls(**found)
        except ValueError as error:
            raise FormatError(f"{path}: clip.vision.image_{error}") from None

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> ImageProcessor:
        """This one with other bounds, where they are not None. ValueError for those out of range or order."""
        given: dict[str, Any] = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        return replace(self, **{name: bound for name, bound in given.items() if bound is not None})

    def process(
        self, image: ImageInput, max_tokens: int | None = None, size: tuple[int, int] | None = None
    ) -> ProcessedImage:
        """Decodes and resizes a picture; one that is processed already is returned as it is.

        size: the (height, width) to come near to, within the bounds; None: the picture's own. ValueError,
        before it is resized, for one that would take more than `max_tokens` tokens.
        """
        if isinstance(image, ProcessedImage):
            return image
        picture = load_image(image)
        factor = self.patch_size * self.merge_size
        height, width = smart_resize(
            *(size or (picture.height, picture.width)), factor, self.min_pixels, self.max_pixels
        )
        tokens = height * width // factor**2
        if max_tokens is not None and tokens > max_tokens:
            raise ValueError(
                f"an image of {picture.width} x {picture.height} takes {tokens} tokens "
                f"({width} x {height} pixels), but the context has room for {max_tokens}; "
                "a lower max_pixels makes it smaller"
            )
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
        digest = hashlib.blake2b(f"{height}x{width}:".encode(), digest_size=16)
        digest.update(pixels.data)
        return ProcessedImage(
            pixels, (1, height // self.patch_size, width // self.patch_size), digest.digest()
        )

    def tokens(self, width: int, height: int) -> int:
        """That a picture of this size takes. Errors of `smart_resize`."""
        factor = self.patch_size * self.merge_size
        rows, columns = smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        return rows * columns // factor**2

    def levels(self) -> NDArray[np.float32]:
        """float32 [3, 256]: what a byte of each channel becomes.

        The reference's roundings: x * (1/255) in double, then float32 throughout.
        """
        scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.image_mean, self.image_std))
        levels: NDArray[np.float32] = (scaled - mean) / std
        return levels

    def patchify(self, image: ProcessedImage) -> NDArray[np.float32]:
        """float32 [n_patches, 3 * temporal_patch_size * patch_size**2], values in the order channel, time,
        row, column; the four patches that will be merged are neighbours."""
        side, merge, frames = self.patch_size, self.merge_size, self.temporal_patch_size
        grid_t, grid_h, grid_w = image.grid_thw
        pixels = image.pixels if image.is_video else np.stack([image.pixels] * frames)  # a still repeats
        blocks = pixels.reshape(grid_t, frames, grid_h // merge, merge, side, grid_w // merge, merge, side, 3)
        # channel, step, block row and column, patch row and column, frame, y, x
        blocks = blocks.transpose(8, 0, 2, 5, 3, 6, 1, 4, 7)
        patches = np.empty((*blocks.shape[1:6], 3, frames, side, side), np.float32)
        for channel, table in enumerate(self.levels()):
            patches[:, :, :, :, :, channel] = table[blocks[channel]]
        return patches.reshape(grid_t * grid_h * grid_w, -1)


def preprocess(
    image: ImageInput, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """(float32 [n_patches, 1176], the grid (t, h, w) in patches), as the released models want a picture."""
    processor = ImageProcessor(min_pixels, max_pixels)
    processed = processor.process(image)
    return processor.patchify(processed), processed.grid_thw


def encoded_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an encoded picture by its header; nothing is decoded. Errors of `load_image`."""
    picture = _opened(io.BytesIO(data), name)
    return picture.width, picture.height


def picture_size(image: Picture) -> tuple[int, int]:
    """(width, height), nothing being decoded, of what is no file object. Errors of `load_image`."""
    if isinstance(image, Image.Image):
        return image.size
    if isinstance(image, np.ndarray):
        return _from_array(image[:1, :1]).size if image.ndim < 2 else (image.shape[1], image.shape[0])
    if isinstance(image, (bytes, bytearray, memoryview)):
        return encoded_size(bytes(image), f"the image ({memoryview(image).nbytes} bytes)")
    assert isinstance(image, (str, PathLike))
    with Path(image).open("rb") as file:
        return _opened(file, printable(fspath(image), 1000)).size


def _decode(file: IO[bytes], name: str) -> Image.Image:
    return _to_rgb(_opened(file, name), name)


def _opened(file: IO[bytes], name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
        try:
            return Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise UnsupportedError(f"{name}: {printable(str(error))}") from None
        except UnidentifiedImageError:
            if _is_heif(file):
                return _heif(file, name)
            raise FormatError(f"{name}: not an image (expected {', '.join(FORMATS)})") from None
        except Exception as error:
            raise _damaged(name, error) from error


def _is_heif(file: IO[bytes]) -> bool:
    """By the brand in its first box (ISO/IEC 23008-12)."""
    file.seek(0)
    head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in (b"heic", b"heix", b"heim", b"mif1", b"msf1", b"avif")


def _heif(file: IO[bytes], name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise UnsupportedError(
            f"{name}: HEIC and AVIF pictures need another package: pip install 'qwen2vl-q[heif]'"
        ) from None
    pillow_heif.register_heif_opener()
    file.seek(0)
    return Image.open(file, formats=("HEIF",))


def _seekable(file: IO[bytes]) -> IO[bytes]:
    """ValueError for a file of text, UnsupportedError for an endless stream."""
    if not isinstance(file.read(0), bytes):
        raise ValueError("an image's file must be open in binary mode")
    if getattr(file, "seekable", lambda: False)():
        return file
    data = file.read(MAX_STREAM_BYTES + 1)
    if len(data) > MAX_STREAM_BYTES:
        raise UnsupportedError(f"a stream of more than {MAX_STREAM_BYTES} bytes")
    return io.BytesIO(data)


def _from_array(array: NDArray[Any]) -> Image.Image:
    pixels = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    is_float = np.issubdtype(pixels.dtype, np.floating)
    known = pixels.dtype == np.uint8 or is_float
    if not known or pixels.ndim not in (2, 3) or channels not in (1, 3, 4) or not pixels.size:
        raise ValueError(
            "an image array must be uint8, or floats from 0 to 1, [height, width] with 1, 3 or 4 channels, "
            f"found {array.dtype} {list(array.shape)}"
        )
    if is_float:
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also nan
            raise ValueError("an image array of floats must have values from 0 to 1")
        pixels = np.rint(pixels * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > MAX_DECODED_PIXELS:
        raise UnsupportedError(
            f"{name}: expected at most {MAX_DECODED_PIXELS} pixels, found {picture.width} x {picture.height}"
        )
    # Older Pillows give a PNG of 16 bits as mode I.
    sixteen_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
    if picture.mode in ("I", "F") and not sixteen_bits:
        raise UnsupportedError(
            f"{name}: expected 8 bits a channel, or 16 of grey, found 32 (mode {picture.mode})"
        )
    try:
        picture.load()
        transparency = picture.info.get("transparency")
        if picture.getexif().get(_ORIENTATION_TAG, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        if sixteen_bits:
            return _from_sixteen_bits(np.asarray(picture), transparency)
        if "A" in picture.getbands() or transparency is not None:
            white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what their parsers meet: OSError, SyntaxError, struct.error
        raise _damaged(name, error) from error


def _from_sixteen_bits(levels: NDArray[Any], transparent: int | None) -> Image.Image:
    """Of grey 0 to 65,535: a 257th, rounded."""
    whole, rest = np.divmod(levels.astype(np.uint16), 257)
    grey = (whole + (rest > 128)).astype(np.uint8)
    if transparent is not None:
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _damaged(name: str, error: Exception) -> FormatError:
    return FormatError(f"{name}: damaged image: {printable(str(error) or type(error).__name__)}")
