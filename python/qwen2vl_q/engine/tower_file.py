"""The vision tower's file, where the model's own has none: given, or found beside it under a usual name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen2vl_q import _native
from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.base.printable import printable

TowerPath = str | os.PathLike[str] | Literal[False] | None

# mmproj-NAME-f16.gguf, NAME-mmproj.gguf, mmproj.gguf, NAME-vision.gguf, qwen2vl-vision.gguf ...
VISION_WORD = re.compile(r"(?<![a-z0-9])vision(?![a-z0-9])")
# What a name says beside the model's: types of weights, parts, and what file it is.
_PART = re.compile(r"-(\d{5})-of-\d{5}$")
_TYPE = re.compile(r"(?<![a-z0-9])(i?q\d\w*|bf16|fp?16|fp?32)(?![a-z0-9])")
_WORDS = re.compile(r"mmproj|(?<![a-z0-9])(vision|model|gguf|ud|i1|imat|imatrix)(?![a-z0-9])|[^a-z0-9]")
TOWER_TYPES = ("F16", "BF16", "F32", "Q8_0")  # the ones to take first


@dataclass(frozen=True)
class TowerFile:
    path: str | None  # None: in the model's own file, or nowhere
    passed_over: Sequence[str] = ()  # where there is none: files that are named like it, and why they are not

    @classmethod
    def of(cls, model: str, given: TowerPath) -> TowerFile:
        """The file `given`, none for False, for None the one that `find` finds."""
        if given is None:
            return cls.find(model)
        return cls(None if given is False else os.fspath(given))

    @classmethod
    def find(cls, model: str) -> TowerFile:
        """For a model without a vision tower: the file beside it that has one, of its width.

        Of several the one whose name fits best counts: the model's own name, then one that it begins with or
        none at all (mmproj-F16.gguf), then any. Of several types of one name F16, BF16, F32, Q8_0, others.
        OSError or Qwen2VLError where the model cannot be read; ValueError, which lists them, where names and
        types leave a choice.
        """
        file = _native.GgufFile(model)
        if _native.has_vision_tower(file):
            return cls(None)
        _native.require_language_model(file)
        width = {t.name: t.shape for t in file.tensors}.get("token_embd.weight", (0,))[-1]
        passed_over: list[str] = []
        for group in _candidates(Path(model)):
            fitting: list[tuple[int, Path]] = []
            for path in group:
                try:
                    fitting.append((_preference(path, width), path))
                except (OSError, Qwen2VLError) as error:
                    passed_over.append(printable(str(error), 400))
            if fitting:
                return cls(str(_only(fitting, model)))
        return cls(None, passed_over)


def _candidates(model: Path) -> Iterator[list[Path]]:
    """Files beside the model that are named like a vision tower's, those whose names fit best first."""
    name = _model_name(model)
    groups: tuple[list[Path], ...] = ([], [], [])
    for path in sorted(model.parent.glob("*.[gG][gG][uU][fF]")):
        part = _PART.search(path.stem)
        if path.name == model.name or (part and int(part[1]) != 1) or not _is_usual(path.stem.lower()):
            continue
        found = _model_name(path)
        groups[0 if found == name else 1 if name.startswith(found) else 2].append(path)
    return iter(groups)


def _is_usual(stem: str) -> bool:
    return "mmproj" in stem or VISION_WORD.search(stem) is not None


def _model_name(path: Path) -> str:
    """Letters and digits of a file's name, less what tells its type and kind."""
    return _WORDS.sub("", _TYPE.sub("", _PART.sub("", path.stem).lower()))


def _preference(path: Path, width: int) -> int:
    """0 for the type that is taken first. Raises where the file is no tower for a model of this width."""
    file = _native.GgufFile(path)
    _native.require_vision_tower(file)
    if (found := _native.vision_tower_width(file)) != width:
        raise Qwen2VLError(
            f"{printable(str(path), 1000)}: another model's vision tower: it projects to {found} features, "
            f"the language model has {width}"
        )
    types = {t.name: t.type for t in file.tensors}
    type = types["mm.2.weight"]
    return TOWER_TYPES.index(type) if type in TOWER_TYPES else len(TOWER_TYPES)


def _only(fitting: Sequence[tuple[int, Path]], model: str) -> Path:
    best = min(preference for preference, _ in fitting)
    names = {_model_name(path) for _, path in fitting}
    chosen = [path for preference, path in fitting if preference == best or len(names) > 1]
    if len(chosen) > 1:
        listing = ", ".join(path.name for path in chosen)
        raise ValueError(
            f"{printable(model, 1000)}: several vision towers beside it ({printable(listing, 400)}): "
            "name one as mmproj"
        )
    return chosen[0]
