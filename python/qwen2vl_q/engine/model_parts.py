"""What a model's file says beside its weights, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen2vl_q import _native
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.chat_template import DEFAULT_TEMPLATE, ChatTemplate
from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.text.tokenizer import Tokenizer
from qwen2vl_q.vision.image_processor import ImageProcessor

_PATH_CHARS = 1000  # of a path in an error


@dataclass(frozen=True)
class ModelParts:
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: Sampling
    processor: ImageProcessor  # its patches are the released ones until `fitted` has seen the tower

    @classmethod
    def read(cls, path: str, vision_path: str) -> ModelParts:
        """From the language model's file and the vision tower's, which may be the same.

        Raises FormatError or UnsupportedError, naming the file and the key.
        """
        file = _native.GgufFile(path)
        _native.require_language_model(file)
        metadata = file.metadata
        vision_metadata = metadata if vision_path == path else _native.GgufFile(vision_path).metadata
        path, vision_path = printable(path, _PATH_CHARS), printable(vision_path, _PATH_CHARS)
        tokenizer = Tokenizer.from_metadata(metadata, path)
        template = metadata.get("tokenizer.chat_template", DEFAULT_TEMPLATE)
        if not isinstance(template, str):
            raise FormatError(
                f"{path}: tokenizer.chat_template: expected a string, found {type(template).__name__}"
            )
        return cls(
            tokenizer,
            ChatTemplate(template, f"{path}: tokenizer.chat_template", tokenizer.special_tokens),
            Sampling.from_metadata(metadata, path),
            ImageProcessor.from_metadata(vision_metadata, vision_path),
        )


def fitted(processor: ImageProcessor, vision: Mapping[str, Any] | None, path: str) -> ImageProcessor:
    """The processor with the patches of the vision tower in the file `path`: `_native`'s "vision_config".

    UnsupportedError for a tower of other than three colour channels.
    """
    if vision is None:
        return processor
    if vision["in_channels"] != 3:
        path = printable(path, _PATH_CHARS)
        raise UnsupportedError(f"{path}: expected 3 colour channels, found {vision['in_channels']}")
    return replace(
        processor,
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
    )


def check_model_file(path: str, mmproj: str | None = None) -> None:
    """Raises what `Qwen2VL.from_gguf(path, mmproj=mmproj)` would for the files' content; of the weights it
    reads next to nothing."""
    vision_path = mmproj or path
    parts = ModelParts.read(path, vision_path)
    fitted(parts.processor, _native.read_config(path, mmproj)["vision_config"], vision_path)
