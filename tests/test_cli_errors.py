"""The command line's errors: suggestions, ranges, streams that are closed, names that no terminal shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import PROGRAM, Run
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.cli.main import COMMANDS


def shell(line: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a line of sh in which `$Q` is the program."""
    return subprocess.run(
        ["sh", "-c", line.replace("$Q", shlex.join(PROGRAM))], capture_output=True, text=True, timeout=60
    )


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "qwen2vl_q", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Usage: qwen2vl-q ")


def test_help_shows_no_ranges_that_are_no_news(run: Run) -> None:
    assert not re.search(r"\d{5,}\]|x<=1000", run("chat", "--help")[1])


def test_help_has_examples(run: Run) -> None:
    for arguments in ([], *([name] for name in COMMANDS)):
        code, out, _ = run(*arguments, "--help")
        assert code == 0 and re.search(r"Examples:\n( +(cat .*)?qwen2vl-q .*\n)+", out), arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convrt"], "No such command 'convrt'. Did you mean 'convert'?"),
        (["chta", "-p", "a"], "No such command 'chta'. Did you mean 'chat'?"),
        (["zzz"], "No such command 'zzz'."),
        (["chat", "--imgae", "a"], "No such option '--imgae'. Did you mean '--image'?"),
    ],
)
def test_suggestions(run: Run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}"), err


@pytest.mark.parametrize("type_", ["Q8_0", "q8_0"])
def test_types_of_files_in_any_case(run: Run, tmp_path: Path, type_: str) -> None:
    code, _, err = run("convert", tmp_path, tmp_path / "out.gguf", "--type", type_)
    assert code == 1 and "config.json" in err, err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "someone/Qwen2-VL-GGUF",
            "someone/Qwen2-VL-GGUF is no file here, and the Hugging Face hub has no such repository; a "
            "private one needs a login (hf auth login) or HF_TOKEN",
        ),
        (
            "hf:Qwen2-VL",
            "expected owner/name[:TYPE][@REVISION], found 'hf:Qwen2-VL'",
        ),
        (
            "Qwen2-VL",
            "Qwen2-VL: there is no such file; expected a GGUF file, a name of the Hugging Face hub, "
            "owner/name[:TYPE][@REVISION], or demo",
        ),
        ("folder", "folder is a folder, not a GGUF file"),
        (
            "checkpoint",
            "checkpoint is a folder with a checkpoint; make a file of it: "
            "qwen2vl-q convert checkpoint checkpoint.gguf",
        ),
        ("", "expected a file's name, found ''"),
        ("missing.gguf", "missing.gguf: No such file or directory"),
        ("some/missing.gguf", "some/missing.gguf: No such file or directory"),
    ],
)
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("command", [["chat", "-p", "a", "-m"], ["inspect"], ["bench", "-m"]])
def test_models_that_are_no_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert run(*command, name) == (1, "", f"error: {message}\n")


def test_the_home_folder_in_a_model_s_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(DEMO_MODEL, tmp_path / "m.gguf")
    assert run("chat", "-m", "~/m.gguf", "-p", "Who are you?")[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--ctx", str(2**63)],
        ["--ctx", "0"],
        ["--top-k", str(2**63)],
        ["--top-k", "0.5"],
        ["-t", "100000"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["-n", str(2**63)],
        ["--temp", "nan"],
        ["--temp", "inf"],
        ["--temp", "1e39"],
        ["--top-p", "nan"],
        ["--min-p", "nan"],
        ["--repeat-penalty", "inf"],
        ["--max-pixels", "9" * 400],
        ["--min-pixels", "9" * 400],
    ],
    ids=lambda options: f"{options[0]} {options[1][:22]}",
)
def test_options_out_of_range(run: Run, options: list[str]) -> None:
    code, out, err = run("chat", "-p", "a", *options)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: Invalid value for [^\n]*'{options[0]}'[^\n]*\n", err), err


# --- streams ---


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: what cannot be written stays in buffers that are flushed at exit."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("$Q chat -m demo -p 'Who are you?' <&-", 0),
        ("$Q chat -m demo <&-", 0),  # no line, no question
        ("$Q chat -m demo -p - <&-", 2),  # an empty prompt
        ("$Q chat -m demo -p 'Who are you?' 2>&-", 0),
        ("$Q chat -m missing.gguf -p a 2>&-", 1),
        ("$Q chat -m demo -p 'Who are you?' >&-", 1),
        ("$Q inspect demo >&-", 1),
        ("$Q --help >&-", 1),
        ("$Q --help <&- >&- 2>&-", 1),
    ],
)
def test_closed_streams(line: str, code: int) -> None:
    done = shell(line)
    assert done.returncode == code, done.stderr
    assert "internal" not in done.stderr and "Traceback" not in done.stderr and "Exception" not in done.stderr
    if "2>&-" not in line and code:
        assert re.fullmatch(r"error: [^\n]*\n", done.stderr), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize("command", ["--help", "inspect demo", "chat -m demo -p Hello"])
def test_a_full_disk(command: str) -> None:
    done = shell(f"$Q {command} >/dev/full")
    assert done.returncode == 1
    assert re.fullmatch(r"error: [^\n]*No space left on device\n", done.stderr), done.stderr


@pytest.mark.parametrize("command", ["--help", "inspect demo --tensors", "inspect demo --json"])
def test_readers_that_leave_before_a_line(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *command.split()], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("command", "code", "out"),
    [
        (["chat", "-m", "missing.gguf"], 1, ""),
        (["chat", "-p", "Who are you?", "-n", "1", "-v"], 0, "I\n"),
        (["chat", "--frobnicate"], 2, ""),
    ],
)
def test_readers_of_notes_that_leave(command: list[str], code: int, out: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*PROGRAM, *command], stdout=subprocess.PIPE, stderr=write, text=True)
    os.close(write)
    assert (done.returncode, done.stdout) == (code, out)


def test_ctrl_c_while_an_answer_is_asked_for(tiny_gguf: Path) -> None:
    options = ["-p", "a", "-n", "1000000", "--ctx", "1000000", "--temp", "0"]
    process = subprocess.Popen(
        [*PROGRAM, "chat", "-m", str(tiny_gguf), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"") and out.endswith(b"\n")


# --- names and texts that a terminal must not obey ---


def test_errors_escape_what_a_terminal_would_obey(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = "a\x1b[31m\x9bb\x07.gguf"
    code, out, err = run("chat", "-m", tmp_path / name, "-p", "a")
    assert (code, out) == (1, "")
    assert err == f"error: {tmp_path}/a\\x1b[31m\\x9bb\\x07.gguf: No such file or directory\n"

    def from_gguf(*_: object, **__: object) -> Qwen2VL:
        raise ValueError("first\nsecond\x1b]0;title\x07" + "x" * 1_000_000)

    monkeypatch.setattr(Qwen2VL, "from_gguf", from_gguf)
    _, _, err = run("chat", "-m", "demo", "-p", "a")
    assert err.startswith("error: first second\\x1b]0;title\\x07xxx") and len(err) < 10_000


def test_results_escape_names(run: Run, tmp_path: Path) -> None:
    shutil.copy(DEMO_MODEL, tmp_path / "m\x1b[31m.gguf")
    code, out, _ = run("inspect", tmp_path / "m\x1b[31m.gguf")
    assert code == 0 and "m\\x1b[31m.gguf" in out and "\x1b" not in out
    code, out, _ = run("demo", "-o", tmp_path / "c\x1b[31m.png")
    assert code == 0 and "c\\x1b[31m.png" in out and "\x1b" not in out


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes")
def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    model, photo = os.fsencode(tmp_path) + b"/m\xff.gguf", os.fsencode(tmp_path) + b"/p\xff.png"
    for command in (
        [b"chat", b"-p", b"a", b"-m", model],
        [b"inspect", model],
        [b"chat", b"-p", b"a", b"--image", photo],
        [b"chat", b"-v", b"-p", b"a", b"-m", model],
        [b"frob\xff"],
        [b"chat", b"--frob\xff"],
    ):
        done = subprocess.run([*PROGRAM, *command], capture_output=True)
        assert done.returncode in (1, 2) and done.stdout == b""
        assert re.fullmatch(rb"(note: .*\n)?error: .*\\udcff.*\n", done.stderr), done.stderr
