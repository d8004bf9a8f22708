"""Nearly whole files: what loads, loads; what does not is one of the library's errors.

QWEN2VL_MUTATIONS: how many of each kind (some hundred a second).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gguf_files import is_vision, rewritten, split_file
from gguf_mutations import mutated, places
from qwen2vl_q import _native
from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.convert import Recipe, convert_gguf, merge_models, split_model
from qwen2vl_q.engine.model_parts import check_model_file
from qwen2vl_q.engine.tower_file import TowerFile

N = int(os.environ.get("QWEN2VL_MUTATIONS", "100"))
Load = Callable[[], object]


@pytest.fixture(scope="module")
def halves(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("halves")
    language = rewritten(tiny_gguf, folder / "m.gguf", keep=lambda name: not is_vision(name))
    return language, rewritten(tiny_gguf, folder / "m-mmproj.gguf", keep=is_vision, architecture="clip")


def attack(original: Path, damaged: Path, loads: list[Load], seed: int) -> None:
    """`loads` read `damaged`, which is `original` changed in some places."""
    data = original.read_bytes()
    where = places(data)
    refused, messages = 0, set()
    for i in range(N):
        damaged.write_bytes(mutated(data, where, np.random.default_rng((seed, i))))
        for load in loads:
            try:
                load()
            except Qwen2VLError as error:
                refused += 1
                messages.add(re.sub(r"\d+", "0", str(error)))
                assert all(line.isprintable() for line in str(error).split("\n")), (seed, i)
                assert len(str(error)) < 8000, (seed, i)
            except Exception as error:
                raise AssertionError(f"mutation {i} of seed {seed}") from error
    assert refused > N * len(loads) / 4 and len(messages) > 10


def test_one_file(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"

    def read() -> None:
        file = _native.GgufFile(path)
        assert len(file.metadata) == len(file.entries)
        for tensor in file.tensors:
            file.raw(tensor.name, 0, min(8, tensor.n_bytes))

    def split() -> None:
        split_model(path, tmp_path / "half", overwrite=True)

    def convert() -> None:
        convert_gguf(path, None, tmp_path / "converted.gguf", Recipe("q8_0"), overwrite=True)

    attack(tiny_gguf, path, [read, lambda: check_model_file(str(path)), split, convert], 1)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_pair(which: int, halves: tuple[Path, Path], tmp_path: Path) -> None:
    pair = [tmp_path / path.name for path in halves]
    pair[1 - which].write_bytes(halves[1 - which].read_bytes())
    language, tower = pair

    def find() -> None:
        check_model_file(str(language), TowerFile.find(str(language)).path)

    def merge() -> None:
        merge_models(language, tower, tmp_path / "whole" / "m.gguf", overwrite=True)

    (tmp_path / "whole").mkdir()
    loads: list[Load] = [lambda: check_model_file(str(language), str(tower)), merge]
    attack(halves[which], pair[which], [*loads, find] if which == 0 else loads, 2 + which)


@pytest.mark.parametrize("which", [0, 1])
def test_a_part(which: int, tiny_gguf: Path, tmp_path: Path) -> None:
    parts = split_file(tiny_gguf, tmp_path, len(_native.GgufFile(tiny_gguf).tensors) // 2 + 1)
    original = parts[which].rename(tmp_path / "original")
    attack(original, parts[which], [lambda: check_model_file(str(parts[0]))], 4 + which)
