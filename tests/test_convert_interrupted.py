"""A converted file appears whole or not at all, whatever ends the conversion."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from conversion import convert
from qwen2vl_q.base.atomic_file import part_of, whole_or_not_at_all
from qwen2vl_q.convert import Recipe, convert_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CheckpointSpec())


def test_existing_files_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match=r"m\.gguf exists"):
        convert_checkpoint(checkpoint, out, Recipe("f32"))
    assert out.read_text() == "precious"
    convert_checkpoint(checkpoint, out, Recipe("f32"), overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_does_not_fit_is_not_begun(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    monkeypatch.setattr("qwen2vl_q.convert.convert.quantize", None)  # calling it would be another error
    with pytest.raises(OSError, match=r"the file needs \d+ bytes, the disk has 1000 left"):
        convert(checkpoint, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_total(checkpoint: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = convert_checkpoint(
        checkpoint, tmp_path / "m.gguf", Recipe("q8_0"), progress=lambda *call: calls.append(call)
    )
    total = sum(t.output.n_bytes for t in report.tensors)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert report.n_bytes == (tmp_path / "m.gguf").stat().st_size > total


# Runs the command with `during` executed at the fifth slice that is quantized.
SCRIPT = """
    import os, signal, sys
    import qwen2vl_q.convert.convert as module
    from qwen2vl_q.cli.main import main
    calls, quantize = [], module.quantize
    def interrupting(*arguments):
        calls.append(type)
        if len(calls) == 5:
            {during}
        return quantize(*arguments)
    module.quantize = interrupting
    sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--force"]))
"""


def run_interrupted(checkpoint: Path, out: Path, during: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT).format(during=during)
    return subprocess.run(
        [sys.executable, "-c", script, str(checkpoint), str(out)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
@pytest.mark.parametrize(
    ("during", "code", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "interrupted: {out} is not written"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + 15, ""),
        ("os.kill(os.getpid(), signal.SIGHUP)", 128 + 1, ""),
        (
            "raise RuntimeError('broken')",
            1,
            "error: internal error, RuntimeError: broken (--debug shows where)",
        ),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))",  # as a full disk
            1,
            "error: {out}: " + os.strerror(errno.EFBIG),
        ),
    ],
    ids=["ctrl-c", "terminated", "hung up", "exception", "disk full"],
)
def test_interrupted_conversions_leave_nothing(
    checkpoint: Path, tmp_path: Path, during: str, code: int, message: str
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("the one before")
    result = run_interrupted(checkpoint, out, during)
    assert result.returncode == code
    assert result.stderr.strip() == message.format(out=out)
    assert result.stdout == ""
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert out.read_text() == "the one before"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_what_a_kill_leaves_is_named_and_written_over(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    result = run_interrupted(checkpoint, out, "os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left == part_of(out)
    size = left.stat().st_size
    result = run_interrupted(checkpoint, out, "pass")
    assert result.returncode == 0
    assert result.stderr == ""
    note = f"m.gguf.part, which a conversion that was killed had left, is gone: {size:,} bytes"
    assert f"note: {note}" in result.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_conversion_that_another_process_makes(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    with whole_or_not_at_all(out, overwrite=False):
        result = run_interrupted(checkpoint, out, "pass")
        assert result.returncode == 1
        assert result.stderr == f"error: {out}: another process is writing it\n"
        assert part_of(out).exists()
