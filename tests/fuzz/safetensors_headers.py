"""A coverage-guided fuzzer of what is read of a checkpoint before its weights: index and headers.

pip install atheris && mkdir -p build/fuzz/checkpoints && \
python tests/fuzz/safetensors_headers.py -max_total_time=600 -max_len=4096 build/fuzz/checkpoints

An input is a line, the index (empty: there is none), and the bytes of a safetensors file. Whatever they are,
the checkpoint opens, and then its tensors are what safetensors reads, or it is refused in one short line.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from safetensors import safe_open

from qwen2vl_q.base import json_files
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint import lora, tensors
from qwen2vl_q.checkpoint.lora import Adapter
from qwen2vl_q.checkpoint.tensors import _DTYPES, FLOATS, Checkpoint, ExpectedTensor

atheris: Any = importlib.import_module("atheris")  # brings no types

INDEX = b'{"weight_map": {"model.norm.weight": "a.safetensors", "visual.x": "b.safetensors"}}'
CONFIG = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'
NAMES = [
    "model.norm.weight", "model.visual.x", "model.language_model.norm.weight", "visual.x", "__metadata__",
    "base_model.model.model.x.lora_A.weight", "base_model.model.model.x.lora_B.weight",
    "base_model.model.model.x.lora_magnitude_vector", "vlm.lm_head.weight", "model.rotary_emb.inv_freq", "",
    "\x1b[2J", "\ud800", "x" * 3000, "\u202e",
]  # fmt: skip
TYPES: list[Any] = [
    *_DTYPES,
    "F64",
    "I64",
    "I8",
    "U16",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "C64",
    "F4",
    "",
    None,
    1,
    [],
    "\x1b",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    8,
    16,
    1 << 20,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**5000,
    0.5,
    True,
]
OTHERS: list[Any] = [None, "1", [], {}, [[]], {"a": "b"}, {"a": 1}]

Entry = dict[str, Any]


def safetensors(header: object, body: bytes) -> bytes:
    sys.set_int_max_str_digits(0)
    text = json.dumps(header).encode()
    sys.set_int_max_str_digits(4300)
    return len(text).to_bytes(8, "little") + text + body


def tensor(dtype: str, shape: list[int], begin: int, n_bytes: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + n_bytes]}


SEEDS = [
    safetensors({}, b""),
    safetensors(
        {"model.norm.weight": tensor("BF16", [2, 3], 0, 12), "x": tensor("U8", [4], 12, 4)}, bytes(16)
    ),
    safetensors({"__metadata__": {"format": "pt"}, "lm_head.weight": tensor("F16", [0, 7], 0, 0)}, b""),
    safetensors(
        {
            "base_model.model.model.x.lora_A.weight": tensor("F32", [2, 4], 0, 32),
            "base_model.model.model.x.lora_B.weight": tensor("F32", [3, 2], 32, 24),
        },
        bytes(range(56)),
    ),
]


def folder_of(data: bytes, folder: Path) -> Path:
    index, _, file = data.partition(b"\n")
    for old in folder.iterdir():
        old.unlink()
    (folder / ("a.safetensors" if index else "model.safetensors")).write_bytes(file)
    (folder / "adapter_model.safetensors").write_bytes(file)
    (folder / "adapter_config.json").write_text(CONFIG)
    if index:
        (folder / "model.safetensors.index.json").write_bytes(index)
        (folder / "b.safetensors").write_bytes(SEEDS[1])
    return folder


def compare(checkpoint: Checkpoint) -> None:
    for name, stored in checkpoint.tensors.items():
        assert stored.name.isprintable()
        if stored.dtype not in _DTYPES or not stored.shape:
            continue
        found = checkpoint.load(name)
        with safe_open(stored.file, framework="numpy") as file:
            expected = file.get_slice(stored.name)
            assert list(found.shape) == expected.get_shape()
        if stored.dtype not in ("BF16", "I32"):  # numpy has no BF16; packed words are taken as unsigned
            with safe_open(stored.file, framework="numpy") as file:
                assert found.tobytes() == file.get_tensor(stored.name).tobytes()
        assert checkpoint.read(name, 0, stored.shape[0]).shape == stored.shape
    checkpoint.check([ExpectedTensor(name, s.shape, FLOATS) for name, s in checkpoint.tensors.items()], ())


def adapt(adapter: Adapter) -> None:
    adapter.summary()
    adapter.check(dict.fromkeys(adapter.targets, (3, 4)))
    list(adapter.updates())
    adapter.require_updates_alone()


FOLDER = Path(tempfile.mkdtemp(dir=os.environ.get("QWEN2VL_FUZZ_SCRATCH")))


def one_input(data: bytes) -> None:
    folder = folder_of(data, FOLDER)
    attempts: list[Callable[[], None]] = [
        lambda: compare(Checkpoint(folder)),
        lambda: adapt(Adapter(folder)),
    ]
    for work in attempts:
        try:
            work()
        except (FormatError, UnsupportedError) as error:
            assert len(str(error)) < 2000, error
            assert printable(str(error), 2000) == str(error), error


# --- inputs that are nearly whole ---


def changed_entry(entry: Any, rng: random.Random) -> Any:
    if not isinstance(entry, dict) or rng.random() < 0.1:
        return rng.choice(OTHERS)
    key = rng.choice(["dtype", "shape", "data_offsets", "data_offsets", "x"])
    old = entry.get(key)
    value: Any = rng.choice(TYPES)
    if key != "dtype":
        value = list(old) if isinstance(old, list) else []
        change = rng.randrange(4)
        if change == 0 or not value:
            value.append(rng.choice(NUMBERS))
        elif change == 1:
            value[rng.randrange(len(value))] = rng.choice(NUMBERS)
        elif change == 2:
            value.pop()
        elif isinstance(value[0], int):
            value[rng.randrange(len(value))] += rng.choice([-1, 1, 2, 4])
    changed = {k: v for k, v in entry.items() if k != key or rng.random() > 0.1}
    return changed | {key: value}


def sized(header: Entry, rng: random.Random) -> Entry:
    """One more tensor, laid behind the rest."""
    ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
    dtype, shape = rng.choice(list(_DTYPES)), [rng.randrange(5) for _ in range(rng.randrange(4))]
    n = _DTYPES[dtype].itemsize
    for size in shape:
        n *= size
    return header | {rng.choice(NAMES): tensor(dtype, shape, max(ends, default=0), n)}


def changed_header(header: Entry, rng: random.Random) -> Entry:
    names = list(header)
    match rng.randrange(5):
        case 0 if names:
            name = rng.choice(names)
            return {k if k != name else rng.choice(NAMES): v for k, v in header.items()}
        case 1 if names:
            del header[rng.choice(names)]
            return header
        case 2:
            return sized(header, rng)
        case _ if names:
            name = rng.choice(names)
            return header | {name: changed_entry(header[name], rng)}
    return sized(header, rng)


def changed_index(index: bytes, rng: random.Random) -> bytes:
    files = ["a.safetensors", "b.safetensors", "c.safetensors", "../a.safetensors", 1, None, "", "\x1b"]
    match rng.randrange(4):
        case 0:
            return b""
        case 1:
            return INDEX
        case 2:
            names = rng.choices(NAMES, k=rng.randrange(4))
            return json.dumps({"weight_map": {name: rng.choice(files) for name in names}}).encode()
    return bytes(atheris.Mutate(index, 400)).replace(b"\n", b" ")


def mutator(data: bytes, max_size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    index, _, file = data.partition(b"\n")
    try:
        length = int.from_bytes(file[:8], "little")
        header, body = json.loads(file[8 : 8 + length]), file[8 + length :]
        assert isinstance(header, dict)
        if rng.random() < 0.2:
            index = changed_index(index, rng)
        else:
            for _ in range(rng.randrange(1, 3)):
                header = changed_header(header, rng)
        if rng.random() < 0.8:  # as long as the header says
            ends = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict)]
            end = max(ends, default=0)
            body = body.ljust(end, b"\7")[:end] if end < max_size else body
        file = safetensors(header, body)
        if rng.random() < 0.1:
            file = bytes(atheris.Mutate(file, max_size))
    except Exception:  # what cannot be taken apart changes as bytes do
        file = bytes(atheris.Mutate(file, max_size))
    return (index + b"\n" + file)[:max_size]


def instrument(*modules: ModuleType) -> None:
    """atheris.instrument_imports does not see through an editable installation."""
    for module in modules:
        classes = [
            c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
        ]
        for place in (module, *classes):
            for value in vars(place).values():
                function = getattr(value, "fget", None) or getattr(value, "func", value)
                if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def main() -> None:
    corpus = next((Path(a) for a in sys.argv[1:] if not a.startswith("-")), None)
    if corpus is not None and corpus.is_dir() and not any(corpus.iterdir()):
        for i, file in enumerate(SEEDS):
            (corpus / f"seed-{i}").write_bytes(b"\n" + file)
            (corpus / f"seed-index-{i}").write_bytes(INDEX + b"\n" + file)
    instrument(lora, tensors, json_files)
    atheris.Setup(sys.argv, one_input, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
