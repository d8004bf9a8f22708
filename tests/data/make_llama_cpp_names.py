"""Regenerates llama_cpp_names.json: names, types, shapes and keys of files that llama.cpp's converter wrote.

Usage: python make_llama_cpp_names.py LANGUAGE-f16.gguf MMPROJ-f16.gguf
Last made with llama.cpp 0c1e570 from a checkpoint of the sizes in test_convert.py (LLAMA_CPP_SPEC). Long
arrays are kept as the SHA-256 of their JSON.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from gguf import GGUFReader


def describe(path: str) -> dict[str, Any]:
    reader = GGUFReader(path)
    keys = {}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value = field.contents()
            if isinstance(value, (list, str)) and len(value) > 40:
                value = hashlib.sha256(json.dumps(value).encode()).hexdigest()
            keys[name] = {"types": [type.name for type in field.types], "value": value}
    tensors = {t.name: {"type": t.tensor_type.name, "shape": t.shape.tolist()} for t in reader.tensors}
    return {"keys": keys, "tensors": tensors}


if __name__ == "__main__":
    language, vision = map(describe, sys.argv[1:3])
    out = Path(__file__).with_name("llama_cpp_names.json")
    out.write_text(json.dumps({"language": language, "vision": vision}, indent=1) + "\n")
