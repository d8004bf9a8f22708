"""Pictures through the vision tower: each once, a slice of the work at a time."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from qwen2vl_q import _native
from qwen2vl_q.engine.embedding_cache import EmbeddingCache
from qwen2vl_q.vision.image_processor import ImageProcessor, ProcessedImage

_CACHE_BYTES = 256 * 1024 * 1024  # some fifty photos of the 2B model


class Encoding:
    """A picture on its way, or arrived, for all who wait for it: without them its work is dropped."""

    def __init__(self, pictures: Pictures, image: ProcessedImage) -> None:
        self._pictures = pictures
        self._image = image
        self._pass: _native.VisionPass | None = None
        self.embeddings = pictures.cache.get(image.key)

    def advance(self, seconds: float, report: Callable[[int, int], None] | None) -> bool:
        """Goes on for about so many seconds; whether the embeddings are there. An Exception ends the work,
        which the next call begins again."""
        if self.embeddings is None:
            if self._pass is None:
                self._pass = self._pictures.begin(self._image)
            try:
                self.embeddings = self._pass.advance(seconds, report)
            except Exception:
                self._pass = None
                raise
            if self.embeddings is not None:
                self._pass = None
                self._pictures.cache.put(self._image.key, self.embeddings)
        return self.embeddings is not None


class Pictures:
    """Whoever uses it, or one of its encodings, holds the scheduler's turn."""

    def __init__(self, native: _native.Model, processor: ImageProcessor) -> None:
        self._native = native
        self._processor = processor
        self.forget()

    def forget(self) -> None:
        self.cache = EmbeddingCache(_CACHE_BYTES)
        self._under_way: WeakValueDictionary[bytes, Encoding] = WeakValueDictionary()

    def encoding(self, image: ProcessedImage) -> Encoding:
        """The one that is under way, where there is one."""
        found = self._under_way.get(image.key)
        if found is None:
            self._under_way[image.key] = found = Encoding(self, image)
        return found

    def begin(self, image: ProcessedImage) -> _native.VisionPass:
        if image.is_video:
            return _native.VisionPass(self._native, self._processor.patchify(image), image.grid_thw)
        return _native.VisionPass.of_pixels(
            self._native, image.pixels, self._processor.levels(), image.grid_thw
        )
