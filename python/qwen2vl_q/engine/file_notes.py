"""What a file lacks, and what of it is slow here, told without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2vl_q import _native
from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.engine.tower_file import TowerFile
from qwen2vl_q.vision.image_processor import MAX_PIXELS, MIN_PIXELS

_FLOATS = {"F32": 32, "F16": 16, "BF16": 16}
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


def lacks(path: str, file: _native.GgufFile, metadata: Mapping[str, Any]) -> list[str]:
    """Of a model or a half of one: what is not in it, and what counts instead."""
    language = any(tensor.name == _EMBEDDING for tensor in file.tensors)
    tower = _native.has_vision_tower(file)
    found = _language_lacks(path, file, metadata, tower) if language else []
    if tower and not language:
        found.append("no language model: it is a vision tower alone")
    if tower and not {"clip.vision.image_min_pixels", "clip.vision.image_max_pixels"} <= metadata.keys():
        found.append(f"no bounds of pictures: the released {MIN_PIXELS:,} to {MAX_PIXELS:,} pixels count")
    counts = Counter(tensor.type for tensor in file.tensors if not _is_computed(tensor.type))
    found += [
        f"no kernels of this build for {type} (tensors: {count}): it cannot be loaded"
        for type, count in counts.items()
    ]
    return found


def _language_lacks(path: str, file: _native.GgufFile, metadata: Mapping[str, Any], tower: bool) -> list[str]:
    try:
        _native.require_language_model(file)
        beside = None if tower else TowerFile.find(path).path
    except (OSError, ValueError, Qwen2VLError) as error:
        return [printable(str(error), 1000)]
    found = []
    if not tower:
        where = (
            "and none beside it: texts alone"
            if beside is None
            else f"but beside it: {printable(beside, 1000)}"
        )
        found.append(f"no vision tower in it, {where}")
    if "tokenizer.chat_template" not in metadata:
        found.append("no chat template: Qwen2-VL's own counts")
    if not any(key.startswith("general.sampling.") for key in metadata):
        found.append("no defaults of sampling: answers are greedy")
    return found


def slow(tensors: Sequence[_native.TensorInfo]) -> list[str]:
    """Matrices without products in 8 bits on this machine's CPU."""
    found = []
    names = {tensor.name for tensor in tensors}
    multiplied = [t for t in tensors if len(t.shape) == 2 and (t.name != _EMBEDDING or _HEAD not in names)]
    for type, bits in _FLOATS.items():
        of_type = [tensor.name for tensor in multiplied if tensor.type == type]
        language = sum(name.startswith(("blk.", _EMBEDDING, _HEAD)) for name in of_type)
        tower = sum(name.startswith(("v.blk.", "mm.")) for name in of_type)
        if language:
            found.append(
                f"{type}: {language} matrices of the language model are multiplied in float32, "
                f"and every token reads {bits} bits a weight of them"
            )
        if tower:
            found.append(f"{type}: {tower} matrices of the vision tower are multiplied in float32")
    if names and _native.supported_isas()[0] == "generic":
        found.append("no kernels for this processor's vectors: plain C++ computes everything")
    return found


def _is_computed(type: str) -> bool:
    try:
        _native.block_layout(type)
    except ValueError:
        return False
    return True
