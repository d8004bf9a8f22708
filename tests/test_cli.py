"""The command line: answers, the conversation, errors in one line, the benchmark."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pictures import encoded, picture
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native, cards
from qwen2vl_q.cli import repl
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.main import COMMANDS, main
from qwen2vl_q.cli.progress import StageBars

PROGRAM = [sys.executable, "-m", "qwen2vl_q.cli.main"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "a photo.png"
    path.write_bytes(encoded(Image.fromarray(picture(120, 90))))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


Run = Callable[..., tuple[int, str, str]]


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
    assert system[0] == 0 and system[1] != out and system[2] == ""


def test_prompt_from_stdin(tiny_gguf: Path) -> None:
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), "-n", "5", "-p"]
    given = subprocess.run([*command, "two\nlines"], capture_output=True, check=True)
    piped = subprocess.run([*command, "-"], input=b"two\nlines\n", capture_output=True, check=True)
    assert piped.stdout == given.stdout and given.stderr == b""


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
        (["inspect", "./demo"], 1, r"error: .*\./demo.*No such file or directory.*"),
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


# --- the conversation ---


def test_lines_of_a_pipe(tiny_gguf: Path, photo: Path, tmp_path: Path) -> None:
    lines = [
        "/image " + str(photo),
        "What?",
        "/nonsense",
        "/image missing.png",
        "And now?",
        " /stats",
        "/stats",
        f"/save {tmp_path / 'talk.json'}",
        f"/save {tmp_path / 'talk.md'}",
        "/system Be loud.",
        "/clear",
        "Again.",
        f"/save {tmp_path / 'second.json'}",
        "/help",
        "/exit",
        "never asked",
    ]
    done = subprocess.run(
        [*PROGRAM, "chat", "-m", str(tiny_gguf), "-n", "4", "-t", "1"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1  # two lines have failed
    assert "a photo.png: 12 tokens" in done.stderr
    assert "error: no command /nonsense" in done.stderr
    assert "error: missing.png: No such file or directory" in done.stderr
    assert re.search(r"prompt \d+ tokens \([1-9]\d+ reused\)", done.stderr)
    assert "system: Be loud." in done.stderr and "Ctrl-C stops an answer" in done.stderr
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"] * 3
    image = {"type": "image", "image": str(photo)}
    assert saved[0]["content"] == [image, {"type": "text", "text": "What?"}]
    assert saved[4]["content"] == " /stats"
    assert "".join(message["content"] + "\n" for message in saved[1::2]) in done.stdout
    markdown = (tmp_path / "talk.md").read_text()
    assert markdown.startswith(f"## user\n\n![]({photo})\n\nWhat?\n\n## assistant\n\n")
    second = json.loads((tmp_path / "second.json").read_text())
    assert [message["content"] for message in second[:2]] == ["Be loud.", "Again."]


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.seen = ""
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Reads until `pattern` is seen, and forgets what came up to it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, f"waited for {pattern!r}, seen {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    new = os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # Linux's end of file on a terminal
                    new = ""
                assert new, f"ended before {pattern!r}: {self.seen!r}"
                if "\x1b[6n" in new:
                    self.send("\x1b[1;1R")  # prompt_toolkit asks where the cursor stands
                self.seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|[\b\r]", "", self.seen + new)
        self.seen = self.seen[found.end() :]
        return found[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def interrupt(self) -> None:
        self.send("\x03")


@pytest.fixture
def terminal(tiny_gguf: Path, tmp_path: Path) -> Iterator[Terminal]:
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), "-n", "3", "-t", "1", "--temp", "0"]
    found = Terminal(command, env)
    yield found
    found.close()


PROMPT = r">[ \n]*$"


def test_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("/help lists the commands.*" + PROMPT)
    terminal.send("\x1b[200~first line\nsecond line\x1b[201~")  # a paste, which is not sent yet
    terminal.wait_for("second line")
    terminal.send("\r")
    terminal.wait_for(PROMPT)
    terminal.send(f"/save {tmp_path / 'talk.json'}\r")
    terminal.wait_for(PROMPT)
    terminal.send("not sent")
    terminal.wait_for("not sent")
    terminal.interrupt()
    terminal.wait_for(PROMPT)
    terminal.send("/exit\r")
    assert terminal.process.wait(30) == 0
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "first line\nsecond line"
    history = tmp_path / "state" / "qwen2vl-q" / "history"
    assert "+first line\n+second line\n" in history.read_text()
    assert history.stat().st_mode & 0o77 == 0


def test_ctrl_c_stops_an_answer_alone(
    tiny: Qwen2VL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(tiny, None, {"max_new_tokens": 8})
    whole = "".join(conversation.ask("Go on"))
    conversation.clear()
    answers = tiny.chat

    def chat(messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        for i, piece in enumerate(answers(messages, **options)):
            if i == 3 and len(messages) == 1:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(tiny, "chat", chat)
    monkeypatch.setattr(repl, "_terminal_lines", lambda: iter(["Go on", "And then?", "/exit"]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    repl.converse(conversation, show_stats=True)
    out, err = capsys.readouterr()
    first, _, second = out.partition("\n")
    assert whole.startswith(first) and 0 < len(first) < len(whole) and second
    assert err.startswith("(stopped)\nprompt ") and re.search(r"\([1-9]\d* reused\)", err)


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
        assert ("Looking at the image" in err) == is_terminal
        assert "Reading the prompt" not in err
