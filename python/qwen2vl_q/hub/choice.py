"""Which files of a repository are the model that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.engine.tower_file import TOWER_TYPES, VISION_WORD
from qwen2vl_q.hub.disk import size_text
from qwen2vl_q.hub.listing import Listing, RemoteFile

# Types as files' names spell them, among words: Qwen2-VL-2B.i1-Q4_K_M.gguf, qwen2-vl-f16.gguf
_TYPE = re.compile(
    r"(?<![a-z0-9])([it]?q\d_(?:k(?:_(?:xl|s|m|l))?|[01](?:_\d_\d)?|nl|xxs|xs|s|m)|bf16|fp?16|fp?32)(?![a-z0-9])"
)
_REPACKED = re.compile(r"Q4_0_\d_\d")  # for one processor each; llama.cpp has dropped them
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_FIRST = ("Q4_K_M", "Q4_0", "Q8_0")
_FEW_BITS = 4
_SHOWN = 20


@dataclass(frozen=True)
class Variant:
    """The language model in one type, and the vision tower's file where it has one of its own."""

    type: str  # Q4_K_M; the file's stem where its name says none
    parts: Sequence[RemoteFile]
    tower: RemoteFile | None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def variants(listing: Listing) -> list[Variant]:
    """The models in a repository's GGUF files. FormatError where parts of a split one are missing."""
    files = [file for name, file in sorted(listing.files.items()) if name.lower().endswith(".gguf")]
    towers = [file for file in files if "mmproj" in file.base.lower()]
    if not towers:
        towers = [file for file in files if VISION_WORD.search(file.base.lower())]
    models = [file for file in files if file not in towers]
    if not models and not any("mmproj" in file.base.lower() for file in towers):
        models, towers = towers, []  # a whole model with the word in its name
    found = []
    for parts in _whole(models):
        stem = stem_of(parts[0].base)
        type = type_in(stem) or stem
        if not _REPACKED.fullmatch(type) and "imatrix" not in type.lower():
            found.append(Variant(type, parts, _tower_for(parts[0], towers)))
    return found


def type_in(stem: str) -> str:
    """The type of weights that a file's name says, Q4_K_M; "" for none."""
    types = _TYPE.findall(stem.lower())
    return types[-1].upper().replace("FP", "F") if types else ""


def stem_of(base: str) -> str:
    """A GGUF file's name less its ending, and less its number where it is a part."""
    match = _PART.fullmatch(base)
    return match[1] if match else base[: -len(".gguf")]


def names_of(type: str, base: str) -> set[str]:
    """What a user may call a model of this type in the file `base`, in lower case."""
    stem = stem_of(base).lower()
    return {type.lower(), stem, f"{stem}.gguf"}


def choose(repository: str, offered: Sequence[Variant], wanted: str | None) -> Variant:
    """The one of the type `wanted`, or whose file has that name. For None: Q4_K_M, else Q4_0, else Q8_0, else
    the smallest of 4 bits and more, else the largest.

    FileNotFoundError, which lists what there is, for a type that is not there; ValueError where several files
    are of it.
    """
    if wanted is None:
        best = min(offered, key=_preference)
        fitting = [variant for variant in offered if variant.type == best.type]
    else:
        fitting = [v for v in offered if wanted.lower() in names_of(v.type, v.parts[0].base)]
    if not fitting:
        raise FileNotFoundError(f"{repository} has no {printable(wanted)}; it has {listed(offered)}")
    if len(fitting) > 1:
        names = ", ".join(stem_of(variant.parts[0].base) for variant in fitting[:_SHOWN])
        raise ValueError(f"{repository} has {len(fitting)} files of {fitting[0].type}: name one of {names}")
    return fitting[0]


def listed(offered: Sequence[Variant]) -> str:
    shown = [
        f"{variant.type} ({size_text(variant.size)})" for variant in sorted(offered, key=lambda v: v.size)
    ]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def checkpoint_weights(listing: Listing) -> list[RemoteFile]:
    """The safetensors files of a checkpoint: the single one, or the shards; none where it has none."""
    files = [f for f in listing.files.values() if not f.folder and f.name.endswith(".safetensors")]
    single = [file for file in files if file.name == "model.safetensors"]
    return single or [file for file in files if "-of-" in file.name] or files


def checkpoint_files(listing: Listing) -> list[RemoteFile]:
    """Its configuration, tokenizer and templates, then its weights; nothing else that lies there."""
    texts = [
        file
        for file in listing.files.values()
        if not file.folder and (file.name.endswith((".json", ".jinja")) or file.name == "merges.txt")
    ]
    return texts + checkpoint_weights(listing)


def _whole(models: Sequence[RemoteFile]) -> list[list[RemoteFile]]:
    """Files, the parts of a split one together and in order."""
    groups: dict[tuple[str, int], list[RemoteFile]] = {}
    for file in models:
        match = _PART.fullmatch(file.name)
        key = (match[1], int(match[3])) if match else (file.name, 1)
        groups.setdefault(key, []).append(file)
    for (name, count), parts in groups.items():
        if len(parts) != count:
            raise FormatError(f"{name}: expected {count} parts in the repository, found {len(parts)}")
    return list(groups.values())


def _tower_for(model: RemoteFile, towers: Sequence[RemoteFile]) -> RemoteFile | None:
    def rank(tower: RemoteFile) -> tuple[bool, int, str]:
        type = type_in(stem_of(tower.base))
        place = TOWER_TYPES.index(type) if type in TOWER_TYPES else len(TOWER_TYPES)
        return tower.folder != model.folder, place, tower.name

    return min(towers, key=rank, default=None)


def _preference(variant: Variant) -> tuple[int, bool, int]:
    few = _bits(variant.type) < _FEW_BITS
    rank = _FIRST.index(variant.type) if variant.type in _FIRST else len(_FIRST)
    return rank, few, -variant.size if few else variant.size


def _bits(type: str) -> int:
    digits = re.search(r"\d+", type) if _TYPE.fullmatch(type.lower()) else None
    return int(digits[0]) if digits else 16
