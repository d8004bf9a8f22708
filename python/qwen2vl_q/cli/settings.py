"""What the user of a conversation may choose, on the command line and while it goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.vision.image_processor import ImageProcessor

_BOUNDS = ("min_pixels", "max_pixels")
_OF_CLIPS = ("fps", "max_frames")
_OF_PICTURES = (*_BOUNDS, "vision_tokens", *_OF_CLIPS)


@dataclass(frozen=True)
class Settings:
    """None stands for the model's own."""

    max_new_tokens: int = 1024
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_pixels: int | None = None  # of pictures
    max_pixels: int | None = None
    vision_tokens: int | None = None  # of a question's pictures and clips together; 0: as many as they take
    fps: float | None = None  # frames a second that are shown of clips
    max_frames: int | None = None

    @property
    def shrinks_by_default(self) -> bool:
        """Nothing has been said of how large pictures may be."""
        return self.max_pixels is None and self.vision_tokens is None

    def for_chat(self) -> dict[str, Any]:
        """Keyword arguments of Qwen2VL.chat."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_PICTURES}

    def in_use(self, model: Qwen2VL) -> dict[str, Any]:
        """Every setting with the model's own values filled in. ValueError for bounds out of order."""
        named = Sampling.__dataclass_fields__.keys() & self.__dataclass_fields__.keys()
        sampling = asdict(model.sampling.override({name: getattr(self, name) for name in named}))
        processor: ImageProcessor = model.image_processor.bounded(self.min_pixels, self.max_pixels)
        return {
            **asdict(self),
            **{name: sampling[name] for name in named},
            **{name: getattr(processor, name) for name in _BOUNDS},
        }
