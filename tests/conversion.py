"""What the converter's tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from qwen2vl_q.convert import FileType, Recipe, Report, convert_checkpoint


def convert(source: Path, out: Path, type: FileType = "f32", vision_type: FileType | None = None) -> Report:
    return convert_checkpoint(source, out, Recipe(type, vision_type), overwrite=True)


def edit_json(path: Path, **changes: Any) -> None:
    """Sets top-level keys; None removes one."""
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def stored_bytes(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}
