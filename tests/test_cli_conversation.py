"""The command line's conversation: lines of a pipe, a terminal, what is stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import PROGRAM
from qwen2vl_q import Qwen2VL
from qwen2vl_q.cli import repl
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.cli.turn import answer
from terminal import PROMPT, Terminal


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
    assert markdown.startswith(f"## user\n\n![]({photo.as_uri()})\n\nWhat?\n\n## assistant\n\n")
    second = json.loads((tmp_path / "second.json").read_text())
    assert [message["content"] for message in second[:2]] == ["Be loud.", "Again."]


@pytest.fixture
def terminal(tiny_gguf: Path, tmp_path: Path) -> Iterator[Terminal]:
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm", "PYTHONUNBUFFERED": "1"}
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), "-n", "3", "-t", "1", "--temp", "0"]
    found = Terminal(command, env)
    yield found
    found.close()


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
    terminal.interrupt()
    terminal.wait_for(r"/exit leaves.*" + PROMPT)
    terminal.send("/exit\r")
    assert terminal.process.wait(30) == 0
    assert json.loads((tmp_path / "talk.json").read_text())[0]["content"] == "first line\nsecond line"
    history = tmp_path / "state" / "qwen2vl-q" / "history"
    assert "+first line\n+second line\n" in history.read_text()
    assert history.stat().st_mode & 0o77 == 0


def test_a_terminal_completes_and_takes_dropped_files(terminal: Terminal, photo: Path) -> None:
    terminal.wait_for(PROMPT)
    terminal.send("/im\t")
    terminal.wait_for("/image")
    terminal.send(f"{photo.parent}/\t")
    terminal.wait_for(r"a photo\.png")
    terminal.send("\r")
    terminal.wait_for(r"a photo\.png: 12 tokens.*" + PROMPT)
    terminal.send(f"'{photo}' Which?\r")
    terminal.wait_for(r"a photo\.png: 12 tokens.*the answer was cut after 3 tokens.*" + PROMPT)
    terminal.send("/stats\r")
    terminal.wait_for(r"images 12 tokens in.*" + PROMPT)  # one and the same: encoded once


def test_a_full_context_says_what_makes_room(tiny_gguf: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "chat", "-m", str(tiny_gguf), "--ctx", "50"], input="a\n", capture_output=True, text=True
    )
    assert done.stderr.splitlines() == [
        "the context is full: 50 cells (--ctx)",
        "/clear forgets the conversation; then there is room again",
    ]


@pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError])
def test_errors_do_not_end_a_conversation(
    tiny: Qwen2VL,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
) -> None:
    answers = tiny.chat

    def chat(messages: list[dict[str, str]], **options: Any) -> Iterator[str]:
        if messages[-1]["content"] == "fail":
            raise error("as asked")
        return answers(messages, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(tiny, "chat", chat)
    monkeypatch.setattr(repl, "_terminal_lines", lambda: iter(["fail", "Go on", "/exit"]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert repl.converse(Conversation(tiny, None, Settings(max_new_tokens=8)), show_stats=False)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and re.match("error: .*as asked.*\nthe answer was cut", err)


@pytest.mark.parametrize("at_terminal", [True, False])
def test_what_a_model_writes_does_not_steer_a_terminal(
    tiny: Qwen2VL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at_terminal: bool
) -> None:
    written = ["a\x1b", "[31m\tb\n", "\x9b2J\x07\r", "é ü"]
    monkeypatch.setattr(tiny, "chat", lambda *_, **__: iter(written))
    monkeypatch.setattr("sys.stdout.isatty", lambda: at_terminal)
    answer(Conversation(tiny, None, Settings()), "Go on")
    shown = "a\\x1b[31m\tb\n\\x9b2J\\x07\\ré ü\n"
    assert capsys.readouterr().out == (shown if at_terminal else "".join(written) + "\n")


def test_ctrl_c_stops_an_answer_alone(
    tiny: Qwen2VL, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(tiny, None, Settings(max_new_tokens=8))
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
    assert re.match(r"\(stopped\)\nthe answer was cut after 8 tokens \(-n\)\nprompt .*[1-9]\d* reused\)", err)
