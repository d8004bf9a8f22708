"""Pictures to preprocess."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: soft waves, hard edges and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = 128 + 70 * np.sin(np.stack([x / 23, y / 17, (x + y) / 31], axis=-1) + seed)
    waves[(x // 40 + y // 25) % 5 == 0] = rng.integers(0, 256, 3)
    grain = rng.integers(-25, 26, (height, width, 3))
    return np.asarray(np.clip(waves + grain, 0, 255), np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """An image as a file of that format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def odd_modes() -> dict[str, bytes]:
    """Files in the modes that are not plain RGB, by name."""
    rgb = Image.fromarray(picture(150, 90, seed=3))
    alpha = Image.fromarray(np.tile(np.arange(150, dtype=np.uint8), (90, 1)) + 60)
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(32)
    grey = rgb.convert("L")
    grey_alpha = Image.merge("LA", (grey, alpha))
    sixteen = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "palette": encoded(palette),
        "palette with transparency": encoded(palette, transparency=5),
        "grey": encoded(grey),
        "grey with a transparent level": encoded(grey, transparency=100),
        "grey with alpha": encoded(grey_alpha),
        "16 bits": encoded(sixteen),
        "16 bits, TIFF": encoded(sixteen, "TIFF"),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "alpha": encoded(rgba),
        "alpha, WebP": encoded(rgba, "WEBP", lossless=True),
        "one bit": encoded(grey.convert("1")),
        "GIF": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
        "BMP": encoded(rgb, "BMP"),
        "rotated by EXIF": encoded(rgb, "JPEG", exif=rotated),
    }
