"""The command line: help, one answer, errors in one line, the packaged model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import PROGRAM, Run
from pictures import encoded
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.cli.main import COMMANDS
from qwen2vl_q.cli.progress import StageBars
from qwen2vl_q.demo import cards


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from qwen2vl_q.cli.main import main; main(['--help']);"
        "sys.exit(bool({'numpy', 'tokenizers', 'PIL', 'jinja2', 'qwen2vl_q._native'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_no_command_is_a_question_for_help(run: Run) -> None:
    assert run() == run("--help")


def test_every_command_has_help(run: Run) -> None:
    for name in COMMANDS:
        code, out, _ = run(name, "--help")
        assert code == 0 and f"Usage: qwen2vl-q {name}" in out and "--debug" in out


def test_version(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN2VL_ISA", raising=False)
    assert (
        f"qwen2vl-q {_native.__version__}, instruction set {_native.supported_isas()[0]}"
        in run("--version")[1]
    )
    monkeypatch.setenv("QWEN2VL_ISA", "generic")
    assert "instruction set generic, forced by QWEN2VL_ISA" in run("--version")[1]
    monkeypatch.setenv("QWEN2VL_ISA", "nonesuch")
    code, out, err = run("--version")
    assert (code, out) == (1, "") and err.startswith("error: QWEN2VL_ISA: expected one of")


def test_one_answer(run: Run, tiny_gguf: Path, photo: Path) -> None:
    options = ["--precision", "exact", "-t", 1, "-n", 12, "--temp", 0]
    code, out, err = run("chat", "-m", tiny_gguf, "--image", photo, "-p", "What?", *options, "--stats", "-v")
    assert code == 0
    model = Qwen2VL.from_gguf(tiny_gguf, precision="exact")
    parts = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    assert out == str(model.chat(messages, stream=False, max_new_tokens=12, temperature=0)) + "\n"
    assert "images 12 tokens in" in err and "answer 12 tokens" in err and "peak memory" in err
    assert "a photo.png: 12 tokens" in err and "1 threads" in err
    system = run("chat", "-m", tiny_gguf, "--image", photo, "-p", "What?", *options, "--system", "Be loud.")
    assert system[0] == 0 and system[1] != out and system[2] == "the answer was cut after 12 tokens (-n)\n"


def test_answers_that_are_cut_say_why(run: Run, tiny_gguf: Path) -> None:
    asked = ("chat", "-m", tiny_gguf, "-p", "a", "--temp", 0)
    assert run(*asked, "-n", 7)[2] == "the answer was cut after 7 tokens (-n)\n"
    prompt = len(Qwen2VL.from_gguf(tiny_gguf).encode_chat([{"role": "user", "content": "a"}])[0])
    assert run(*asked, "--ctx", prompt + 9)[2] == f"the context is full: {prompt + 9} cells (--ctx)\n"
    assert run("chat", "-m", "demo", "-p", "Who are you?")[2] == ""


def test_prompt_from_stdin(tiny_gguf: Path) -> None:
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), "-n", "5", "-p"]
    given = subprocess.run([*command, "two\nlines"], capture_output=True, check=True)
    piped = subprocess.run([*command, "-"], input=b"two\nlines\n", capture_output=True, check=True)
    assert piped.stdout == given.stdout and given.stderr == b"the answer was cut after 5 tokens (-n)\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["chat", "-m", "{missing}.gguf", "-p", "a"], 1, r"error: .*\.gguf: No such file or directory"),
        (["chat", "-m", "{text}", "-p", "a"], 1, r"error: .*notes\.txt: .*not a GGUF file.*"),
        (
            ["chat", "-m", "{model}", "-p", "a", "--image", "{missing}.png"],
            1,
            r"error: .*No such file or directory",
        ),
        (
            ["chat", "-m", "{model}", "-p", "a", "--image", "{text}"],
            1,
            r"error: .*notes\.txt: not an image .*",
        ),
        (
            ["chat", "-m", "{model}", "-p", "a", "--image", "{long}"],
            1,
            "error: .*aspect ratio .* 4020 x 20 is 201",
        ),
        (
            ["chat", "-m", "{model}", "-p", "a", "--ctx", "9"],
            1,
            r"error: the prompt takes \d+ tokens, .* holds 9 .*",
        ),
        (
            ["chat", "-m", "{model}", "-p", "a", "--min-pixels", "9", "--max-pixels", "8"],
            1,
            "error: .*min_pixels.*",
        ),
        (["chat", "-m", "{model}", "-p", " "], 2, "error: the prompt is empty .*"),
        (["chat", "-m", "{model}", "-p", "a", "-n", "0"], 2, "error: .*max-new-tokens.*"),
        (["chat", "--mmproj", "{text}", "-p", "a"], 2, r"error: --mmproj .*-m .*see qwen2vl-q chat --help\)"),
        (["chat", "-m", "./demo", "-p", "a"], 1, r"error: demo: No such file or directory"),
        (["inspect", "./demo"], 1, r"error: demo: No such file or directory"),
        (["demo", "-o", "{text}"], 2, r"error: .*notes\.txt' does not end in \.png.*"),
        (["demo", "-o", "{missing}/card.png"], 2, r"error: there is no folder '.*missing'.*"),
        (["demo", "-o", "{long}"], 2, r"error: .*long\.png exists: pass --force to overwrite it .*"),
        (["chat", "-m", "{model}", "--frobnicate"], 2, "error: No such option.*--frobnicate.*"),
        (["frobnicate"], 2, "error: No such command 'frobnicate'.*"),
        (["bench", "-m", "{text}"], 1, r"error: .*notes\.txt: .*"),
        (["bench"], 2, "error: Missing option '-m'.*"),
    ],
)
def test_errors_are_one_line(
    run: Run,
    arguments: list[str],
    code: int,
    message: str,
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("neither a picture nor a model")
    (tmp_path / "long.png").write_bytes(encoded(Image.new("RGB", (4020, 20))))
    names = {
        "missing": tmp_path / "missing",
        "text": tmp_path / "notes.txt",
        "long": tmp_path / "long.png",
        "model": tiny_gguf,
    }
    found, out, err = run(*(argument.format(**names) for argument in arguments))
    assert (found, out) == (code, "")
    assert re.fullmatch(message + "\n", err), err


# --- the packaged model ---


def test_naming_the_packaged_model_loads_nothing() -> None:
    code = (
        "import sys; from qwen2vl_q import DEMO_MODEL;"
        "sys.exit(bool({'numpy', 'tokenizers', 'PIL', 'qwen2vl_q._native'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_chat_without_a_model_asks_the_packaged_one_and_says_so(run: Run) -> None:
    model = Qwen2VL.from_gguf(DEMO_MODEL)
    expected = model.chat([{"role": "user", "content": "Who are you?"}], stream=False, temperature=0)
    code, out, err = run("chat", "-p", "Who are you?")
    assert (code, out) == (0, expected + "\n")
    assert re.fullmatch("note: .*demo model.*drawn cards.*-m M.gguf.*\n", err), err
    assert run("chat", "-m", "demo", "-p", "Who are you?") == (0, out, "")


def test_demo_names_the_packaged_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("inspect", "demo", "--json")
    assert code == 0 and json.loads(out)["metadata"]["general.name"] == "Qwen2VL demo"
    measured: list[Sequence[str]] = []

    def measure_all(models: Sequence[str], settings: object) -> list[object]:
        measured.append(models)
        return []

    monkeypatch.setattr("qwen2vl_q.cli.bench.measure_all", measure_all)
    run("bench", "-m", "demo", "--json")
    assert measured == [(str(DEMO_MODEL),)]


def test_demo_draws_asks_and_tells_times(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("demo", "--seed", 3, "-t", 1)
    assert code == 0
    card, things = cards.example(3)
    with Image.open("card-3.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(card))
    assert out.startswith(
        f"card-3.png: {card.width} x {card.height} pixels\n\nWhat is in the picture?\n  answer  "
    )
    assert all(thing.full_name in out for thing in things)
    assert len(re.findall(r"^  answer  \S.*\n  truth   \S", out, re.MULTILINE)) == 3
    assert re.search(
        r"First token: [\d.]+ ms .*\(\d+ tokens\), [\d.]+ ms .*; \d+ tokens/s \(\w+, 1 threads\)", err
    )
    assert run("demo", "--seed", 3, "-t", 1)[:2] == (code, out)  # the same card may stay
    assert [path.name for path in tmp_path.iterdir()] == ["card-3.png"]


def test_demo_keeps_what_it_did_not_write(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "mine.PNG"
    out.write_bytes(b"precious")
    code, _, err = run("demo", "-o", out)
    assert code == 2 and "pass --force" in err
    assert out.read_bytes() == b"precious"
    assert run("demo", "-o", out, "--force")[0] == 0
    with Image.open(out) as saved:
        assert saved.size == cards.example(0)[0].size


def test_ctrl_c_ends_the_demo_s_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chat(*_: object, **__: object) -> Iterator[str]:
        yield "A red"
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2VL, "chat", chat)
    code, out, err = run("demo", "-o", tmp_path / "card.png")
    assert (code, err) == (130, "") and out.endswith("\n  answer  A red\n")


def test_debug_shows_the_traceback(run: Run) -> None:
    for arguments in (["--debug", "chat", "-m", "x.gguf"], ["chat", "--debug", "-m", "x.gguf"]):
        code, _, err = run(*arguments)
        assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: x.gguf")


def test_reader_that_leaves(tiny_gguf: Path) -> None:
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), "-p", "a", "-n", "2000", "--temp", "9"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait(60) == 141


def test_bars_appear_for_what_takes_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("qwen2vl_q.cli.progress.time.monotonic", lambda: now[0])
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=is_terminal: answer)
        with StageBars() as bars:
            for stage, seconds in (("prefill", 0.01), ("image", 10.0)):
                for done in range(5):
                    now[0] += seconds
                    bars(stage, done, 4)
        err = capsys.readouterr().err
        assert ("about" in err) != is_terminal and "Looking at the image" in err
        assert "Reading the prompt" not in err
