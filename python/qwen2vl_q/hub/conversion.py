"""A checkpoint of the hub becomes a file in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.base.json_files import quoted, read_json
from qwen2vl_q.base.printable import printable
from qwen2vl_q.convert import FILE_TYPES, FileType, Recipe, convert_checkpoint, default_recipe
from qwen2vl_q.convert.config import read_config
from qwen2vl_q.convert.writer import Progress

TYPES: Sequence[str] = [type.upper() for type in FILE_TYPES]


def default_type(config: Path) -> str:
    """As of the command convert, for the checkpoint of a config.json."""
    return default_recipe(config.parent).type.upper()


def require_qwen2vl(repository: str, config: Path) -> None:
    """UnsupportedError for a config.json of another architecture. FormatError where it is none."""
    root = read_json(config)
    model_type, architectures = root.get("model_type"), root.get("architectures")
    if model_type not in (None, "qwen2_vl"):
        kind = f" ({printable(architectures)})" if architectures else ""
        raise UnsupportedError(f"{repository} is {quoted(model_type)}{kind}, not Qwen2-VL")


def require_checkpoint(config: Path) -> None:
    """What the converter would refuse in a config.json, before the weights are there."""
    read_config(config.parent)


def convert(folder: Path, out: Path, type: str, name: str, progress: Progress | None) -> Sequence[str]:
    """Makes the file `out`, whole or not at all, and returns notes about it. Errors as of
    `convert_checkpoint`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = default_recipe(folder)  # keeps the integers of packed checkpoints
    if recipe.type != type.lower():
        recipe = Recipe(cast(FileType, type.lower()))
    report = convert_checkpoint(folder, out, recipe, name, progress=progress)
    return report.notes


def rough_size(weights: int, type: str) -> int:
    """Bytes that a 16-bit checkpoint of so many takes in a type, to see whether a disk will do: embeddings
    and the vision tower have more bits than the type says."""
    bits = int("".join(c for c in type.split("_")[0] if c.isdecimal()))
    return weights * min(bits + 2, 32) // 16
