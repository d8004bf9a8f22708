"""bench --types: a row a type, as soon as it is there."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from qwen2vl_q.cli import bench_types
from qwen2vl_q.cli.bench_run import Runner
from qwen2vl_q.cli.bench_tables import Result
from qwen2vl_q.measure.limits import Limits
from tables import cells

SMALL = ("--image-size", "56x56", "--prompt-tokens", "8,4", "--decode-tokens", 2, "--repeat", 1, "-t", 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", CheckpointSpec(dtype="BF16"), seed=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Ceilings are measured for an instant; temporary files lie in a folder that must be empty at the end."""
    monkeypatch.setattr(Runner, "_limits", lambda self, tell: Limits.measure("generic", 1, 0.005))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield temporary
    assert list(temporary.iterdir()) == []


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured twice: every later file gets the first one's figures."""
    measured: list[Result] = []
    run = Runner.run

    def once(self: Runner, model: str, tell: Any) -> Result:
        if not measured:
            measured.append(run(self, model, tell))
        return measured[0]

    monkeypatch.setattr(Runner, "run", once)


def test_json_of_every_type(run: Run, source: Path) -> None:
    code, out, err = run("bench", "--types", "q4_0,F32", source, *SMALL, "--json")
    assert code == 0, err
    small, large = json.loads(out)
    assert [row["file_type"] for row in (small, large)] == ["q4_0", "f32"]
    assert [row["type"] for row in (small, large)] == ["Q4_0", "F32"]
    assert small["file_bytes"] < large["file_bytes"]
    assert large["kl_mean"] < 1e-4 < small["kl_mean"] <= small["kl_p99"]
    assert 0 <= small["same_likeliest"] <= large["same_likeliest"] <= 1
    assert small["compared_tokens"] == large["compared_tokens"] > 500
    assert "measuring small-q4_0.gguf (2 of 3): writing the file\n" in err


@pytest.mark.usefixtures("instant")
def test_table_and_csv(run: Run, source: Path) -> None:
    code, out, _ = run("bench", "--types", "q8_0,f16", source, *SMALL)
    heading, *rows = cells(out)
    assert code == 0
    assert heading == [
        *("type", "size", "bits", "image 56x56", "prefill 8", "prefill 4", "decode at 0", "peak memory"),
        *("KL", "same likeliest"),
    ]
    assert [row[0] for row in rows] == ["q8_0", "f16"]
    assert all(len(row) == len(heading) and all(row) for row in rows)
    assert "KL: nats a token, mean over" in out

    code, out, _ = run("bench", "--types", "q8_0,f16", source, *SMALL, "--csv")
    table = list(csv.DictReader(io.StringIO(out)))
    assert (code, [row["type"] for row in table]) == (0, ["q8_0", "f16"])
    assert list(table[0])[5:] == [
        *("image 56x56 s", "prefill 8 tokens/s", "prefill 4 tokens/s", "decode at 0 tokens/s"),
        *("peak_memory_bytes", "kl_mean", "kl_p99", "same_likeliest"),
    ]
    assert all(float(value) > 0 for name, value in table[0].items() if name not in ("type", "isa"))


@pytest.mark.usefixtures("instant")
def test_files_of_a_folder_are_found_again(run: Run, source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    arguments = ("bench", "--types", "q8_0", source, *SMALL, "--folder", made)
    assert run(*arguments)[0] == 0
    (file,) = made.iterdir()
    assert file.name == "small-q8_0.gguf"
    written = file.stat().st_mtime_ns
    code, _, err = run(*arguments)
    assert (code, file.stat().st_mtime_ns) == (0, written)
    assert "the file is there" in err

    other = write_checkpoint(tmp_path / "other", CheckpointSpec(depth=3), seed=3)
    file.rename(made / "other-q8_0.gguf")
    code, out, err = run("bench", "--types", "q8_0,f16", other, *SMALL, "--folder", made, "--csv")
    assert code == 1
    assert "error: q8_0: " in err
    assert "depth: expected the reference's 3, found 2" in err
    assert [row["type"] for row in csv.DictReader(io.StringIO(out))] == ["f16"]


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("output", [(), ("--csv",), ("--json",)])
def test_finished_rows_stay(
    run: Run, source: Path, output: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Runner.run

    def interrupted(self: Runner, model: str, tell: Any) -> Result:
        if model.endswith("-f16.gguf"):
            raise KeyboardInterrupt
        return made(self, model, tell)

    monkeypatch.setattr(Runner, "run", interrupted)
    code, out, err = run("bench", "--types", "q8_0,f16,f32", source, *SMALL, *output)
    assert code == 130
    assert "interrupted: the rows above are whole" in err
    assert "q8_0" in out
    assert "f32" not in out.replace("fp32", "").replace("f32, ", "")
    if output == ("--json",):
        assert [row["file_type"] for row in json.loads(out)] == ["q8_0"]


@pytest.mark.usefixtures("instant")
def test_a_gguf_file_is_a_source(run: Run) -> None:
    code, out, _ = run("bench", "--types", "q8_0", "demo", *SMALL, "--json")
    (row,) = json.loads(out)
    assert (code, row["model"].rpartition("/")[2], row["type"]) == (0, "demo-q8_0.gguf", "Q8_0")
    assert 0 < row["kl_mean"] < 0.01


def test_usage(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (["--types", "q9", source], "expected some of q4_0, "),
        (["--types", "q8_0"], "give SOURCE instead of -m"),
        (["--types", "q8_0", source, "-m", "demo"], "give SOURCE instead of -m"),
        (["--types", "q8_0", source, "--lora", source], "merge it first"),
        ([source], "belong to --types"),
        (["-m", "demo", "--plot", "x.svg"], "belong to --types"),
        ([], "Missing option '-m' / '--model'."),
    ):
        code, out, err = run("bench", *arguments)
        assert (code, out) == (2, "")
        assert message in err
    monkeypatch.setattr(bench_types, "find_spec", lambda name: None)
    code, _, err = run("bench", "--types", "q8_0", source, "--plot", "x.svg")
    assert (code, "pip install 'qwen2vl-q[plot]'" in err) == (2, True)


@pytest.mark.usefixtures("instant")
def test_plot(run: Run, source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    out = tmp_path / "types.svg"
    assert run("bench", "--types", "q4_0,q8_0", source, *SMALL, "--plot", out)[0] == 0
    assert out.read_text(encoding="utf-8").lstrip().startswith("<?xml")
