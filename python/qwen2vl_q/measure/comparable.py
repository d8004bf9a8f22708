"""Whether two files hold the same model but for the types of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2vl_q import _native
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.chat_template import DEFAULT_TEMPLATE
from qwen2vl_q.convert.config import read_config
from qwen2vl_q.convert.metadata import metadata
from qwen2vl_q.convert.tokenizer_files import read_tokenizer
from qwen2vl_q.measure.model_source import ModelFile, Source
from qwen2vl_q.vision.image_processor import ImageProcessor

_UNUSED = 5  # tokenizer.ggml.token_type: what fills a vocabulary up
_CLOSE = 1e-4  # numbers that programs round in different ways
_FREE = {"max_position_embeddings", "tie_word_embeddings"}  # no size: how a file says the same


@dataclass(frozen=True)
class Description:
    """What a model is beside its weights. Sizes have the names of `Qwen2VLConfig`, keys those of GGUF."""

    path: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None
    keys: Mapping[str, Any]
    vision_keys: Mapping[str, Any]

    @classmethod
    def of(cls, source: Source) -> Description:
        """Errors as of loading or converting it."""
        path = printable(source.path, 1000)
        if isinstance(source, ModelFile):
            sizes = _native.read_config(source.path, source.mmproj)
            keys, *vision_keys = (file.metadata for file in source.open())
            return cls(path, sizes["text_config"], sizes["vision_config"], keys, (vision_keys or [keys])[0])
        config = read_config(Path(source.path))
        tokenizer = read_tokenizer(Path(source.path), config)
        keys = {entry.key: entry.value for entry in metadata("", config, source.lossless_type, tokenizer, 0)}
        return cls(path, vars(config.text), vars(config.vision), keys, keys)


def require_comparable(model: Source, reference: Source) -> list[str]:
    """Notes on what else differs. ValueError for another architecture, shape or vocabulary; errors as of
    loading them."""
    found, expected = Description.of(model), Description.of(reference)
    _require_same(f"{found.path}: ", found.text, expected.text)
    if found.vision is None or expected.vision is None:
        if found.vision != expected.vision:
            has, lacks = (found, expected) if expected.vision is None else (expected, found)
            raise ValueError(f"{lacks.path}: no vision tower in it or beside it; {has.path} has one")
    else:
        _require_same(f"{found.path}: vision tower: ", found.vision, expected.vision)
    _require_same_vocabulary(found.path, found.keys, expected.keys)
    return _notes(found, expected)


def _require_same(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if name in _FREE or name not in found:
            continue
        same = (
            math.isclose(found[name], value, rel_tol=_CLOSE)
            if isinstance(value, float)
            else found[name] == value
        )
        if not same:
            raise ValueError(f"{where}{name}: expected the reference's {value}, found {found[name]}")


def _require_same_vocabulary(place: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    tokens, of_reference = _tokens(found), _tokens(expected)
    for k, (token, other) in enumerate(zip(tokens, of_reference, strict=False)):
        if token != other:
            raise ValueError(
                f"{place}: token {k}: expected the reference's '{printable(other)}', "
                f"found '{printable(token)}'"
            )
    if len(tokens) != len(of_reference):
        raise ValueError(f"{place}: expected the reference's {len(of_reference)} tokens, found {len(tokens)}")
    if found.get("tokenizer.ggml.merges") != expected.get("tokenizer.ggml.merges"):
        raise ValueError(f"{place}: tokenizer.ggml.merges: expected those of the reference, found others")


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Without what fills the vocabulary up."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = metadata.get("tokenizer.ggml.token_type", [])
    while tokens and len(types) >= len(tokens) and types[len(tokens) - 1] == _UNUSED:
        tokens.pop()
    return tokens


def _notes(found: Description, expected: Description) -> list[str]:
    notes = []
    key = "tokenizer.chat_template"
    if found.keys.get(key, DEFAULT_TEMPLATE) != expected.keys.get(key, DEFAULT_TEMPLATE):
        notes.append("another chat template than the reference's, by which both were asked")
    own, other = (
        vars(ImageProcessor.from_metadata(each.vision_keys, each.path)) for each in (found, expected)
    )
    notes += [
        f"{name}: {own[name]}, the reference has {other[name]}" for name in own if own[name] != other[name]
    ]
    return notes
