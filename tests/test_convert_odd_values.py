"""Values of a checkpoint's JSON replaced by odd ones: a model that loads, or one line that says why not."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from conversion import convert
from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import FormatError, UnsupportedError

OLD = CheckpointSpec()
NEW = CheckpointSpec(layout="nested", naming="nested", tokenizer="vocab", n_shards=2)
FILES = [
    *((OLD, name) for name in ("config.json", "generation_config.json", "preprocessor_config.json")),
    *((OLD, name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json")),
    (OLD, "model.safetensors"),
    *((NEW, name) for name in ("config.json", "vocab.json", "model.safetensors.index.json")),
]
IDS = [f"{'old' if spec is OLD else 'new'}-{name}" for spec, name in FILES]

# As they stand in the file: Python's json would not write all of them.
ODD_VALUES = [
    *("null", "true", "false", "0", "-1", "1", "3", "2.5", "-0.0", "0.3", "1e-50", "7", "1000", "4294967295"),
    *("9223372036854775808", "1e39", "1e300", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000),
    *('""', '" "', '"x"', '"64"', '"../x.safetensors"', '"\\u001b[2J\\n\\u202e"', '"\\ud800"', '"{% if %}"'),
    *("[]", "[[]]", "[null]", '["x"]', "[1, 2, 3]", "[0.5, 0.5, 0.5]", "[1e39, 1e39, 1e39]", "[0, 0, 0]"),
    *("{}", '{"": null}', '{"x": "y"}', '{"content": "\\u001b"}', '{"id": 5}', '{"a": 1, "a": [2]}'),
    *("[" * 300 + "]" * 300, '{"a":' * 300 + "1" + "}" * 300, '"' + "x" * 100_000 + '"'),
    "[" + "7," * 50_000 + "7]",
]
REMOVED = ""  # the member or item with its key
PLACEHOLDER = "<odd value>"
ITEMS_TRIED = 40  # of a long list or object: the first half of that and the last


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every branch and leaf."""
    yield path
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    if len(keys) > ITEMS_TRIED:
        keys = [*keys[: ITEMS_TRIED // 2], *keys[-2:]]
    for key in keys:
        yield from places(value[key], (*path, key))


def replaced(text: str, path: tuple[Any, ...], odd: str) -> str:
    root = {"": json.loads(text)}
    parent: Any = root
    for key in ("", *path)[:-1]:
        parent = parent[key]
    key = ("", *path)[-1]
    if odd == REMOVED:
        del parent[key]
    else:
        parent[key] = PLACEHOLDER
    return json.dumps(root.get("")).replace(json.dumps(PLACEHOLDER), odd)


def read(path: Path) -> str:
    if path.suffix != ".safetensors":
        return path.read_text()
    data = path.read_bytes()
    return data[8 : 8 + int.from_bytes(data[:8], "little")].decode()


def write(path: Path, text: str, before: bytes) -> None:
    if path.suffix != ".safetensors":
        path.write_text(text)
        return
    header = text.encode()
    start = 8 + int.from_bytes(before[:8], "little")
    path.write_bytes(len(header).to_bytes(8, "little") + header + before[start:])


def outcome(folder: Path, file: str, out: Path) -> str:
    """What became of a conversion: "" or its error's message. Fails for one that is not fit for users."""
    try:
        convert(folder, out)
    except (FormatError, UnsupportedError, ValueError) as error:
        message = str(error).replace(f"{folder}/", "").replace(str(folder), "")
        assert type(error) in (FormatError, UnsupportedError, ValueError)
        assert message.isprintable()
        assert len(message) < 500
        assert file in message or "config.json" in message  # where two files disagree, config.json is right
        assert not list(out.parent.iterdir())
        return message
    model = Qwen2VL.from_gguf(out, n_threads=1)
    model.sampling.sampler()
    out.unlink()
    return ""


def try_some(spec: CheckpointSpec, file: str, tmp_path: Path, seed: int, count: int) -> None:
    folder, out = write_checkpoint(tmp_path / "c", spec), tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    before, text = (folder / file).read_bytes(), read(folder / file)
    values = (*ODD_VALUES, REMOVED)
    cases = [(path, odd) for path in places(json.loads(text)) for odd in values if path or odd]
    failures, messages = [], set()
    for path, odd in random.Random(seed).sample(cases, min(count, len(cases))):
        write(folder / file, replaced(text, path, odd), before)
        try:
            messages.add(outcome(folder, file, out))
        except Exception as error:
            failures.append(f"{list(path)} = {odd[:40]}: {type(error).__name__}: {error!s:.200}")
            for left in out.parent.iterdir():
                left.unlink()
    if failures:
        pytest.fail(f"{len(failures)} failures\n" + "\n".join(failures[:20]), pytrace=False)
    assert len(messages) > 3, messages  # the values do reach the checks


@pytest.mark.parametrize(("spec", "file"), FILES, ids=IDS)
def test_odd_values(spec: CheckpointSpec, file: str, tmp_path: Path) -> None:
    try_some(spec, file, tmp_path, seed=7, count=50)


@pytest.mark.slow  # all of them, 34,000, take ten minutes: QWEN2VL_MUTATIONS is how many a file gets
@pytest.mark.parametrize(("spec", "file"), FILES, ids=IDS)
def test_more_odd_values(spec: CheckpointSpec, file: str, tmp_path: Path) -> None:
    try_some(spec, file, tmp_path, seed=8, count=int(os.environ.get("QWEN2VL_MUTATIONS", "100")))


def test_odd_lines_of_merges(tmp_path: Path) -> None:
    folder, out = write_checkpoint(tmp_path / "c", NEW), tmp_path / "out" / "m.gguf"
    out.parent.mkdir()
    path = folder / "merges.txt"
    text = path.read_text()
    for odd in (
        "",
        "\n\n",
        "a",
        "a b c",
        "a  b",
        "\x1b[2J \x07",
        "a " + "b" * 100_000,
        "\u2028 x",
        "\ud800 x",
    ):
        path.write_text(text + odd, errors="surrogatepass")
        assert bool(outcome(folder, "merges.txt", out)) == bool(odd.strip("\n")), odd[:20]
