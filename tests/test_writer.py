"""GGUF heads as the Python package gguf writes them, byte for byte."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFValueType as T

from qwen2vl_q.convert.entries import Entry, StoredEntry
from qwen2vl_q.convert.writer import Contents, OutputTensor

ENTRIES = [
    Entry("a.string", "Grüße \U0001f600", T.STRING),
    Entry("an.empty.string", "", T.STRING),
    *(Entry(f"a.{t.name}", 7, t) for t in (T.UINT8, T.INT8, T.UINT16, T.INT16, T.UINT32, T.UINT64)),
    *(Entry(f"minus.{t.name}", -7, t) for t in (T.INT32, T.INT64)),
    Entry("a.float", 0.1, T.FLOAT32),
    Entry("a.double", 0.1, T.FLOAT64),
    Entry("a.bool", True, T.BOOL),
    Entry("strings", ["", "a", "ü"], T.ARRAY),
    Entry("integers", [1, -2, 3], T.ARRAY),
    Entry("floats", [0.5, 0.1], T.ARRAY),
    Entry("bools", [True, False], T.ARRAY),
]
TENSORS = [
    OutputTensor("v", "F32", (5,)),
    OutputTensor("m", "Q4_0", (3, 64)),
    OutputTensor("p", "F16", (2, 3, 14, 14)),
    OutputTensor("k", "Q6_K", (1, 256)),
]


def test_a_head_is_what_gguf_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2vl")
    for entry in ENTRIES:
        writer.add_key_value(entry.key, entry.value, entry.type)
    for tensor in TENSORS:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.n_bytes,
            gguf.GGMLQuantizationType[tensor.type],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    expected = (tmp_path / "m.gguf").read_bytes()
    head = Contents(ENTRIES, TENSORS).head
    assert head == expected + bytes(-len(expected) % 32)
    stored = [StoredEntry(entry.key, entry.encoded) for entry in ENTRIES]
    assert Contents(stored, TENSORS).head == head
