"""What Tab offers: in the shell, and in the conversation."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from command_line import PROGRAM
from qwen2vl_q.cli.line_editor import SlashCompleter


def complete(instruction: str, words: str = "", cword: int = 0) -> str:
    env = {**os.environ, "_QWEN2VL_Q_COMPLETE": instruction, "COMP_WORDS": words, "COMP_CWORD": str(cword)}
    return subprocess.run(PROGRAM, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_s_script(shell: str) -> None:
    script = complete(f"{shell}_source")
    assert f"_QWEN2VL_Q_COMPLETE={shell}_complete" in script and "Usage" not in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("qwen2vl-q con", "plain,convert\n"),
        ("qwen2vl-q chat --top", "plain,--top-k\nplain,--top-p\n"),
        ("qwen2vl-q chat --precision e", "plain,exact\n"),
        ("qwen2vl-q chat -m mod", "file,mod\n"),
        ("qwen2vl-q chat --mmproj mod", "file,mod\n"),
        ("qwen2vl-q chat --image pho", "file,pho\n"),
        ("qwen2vl-q inspect mod", "file,mod\n"),
        ("qwen2vl-q bench -m mod", "file,mod\n"),
    ],
)
def test_the_shell_completes(words: str, expected: str) -> None:
    assert complete("bash_complete", words, len(words.split()) - 1) == expected


# --- in the conversation ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("photo one.png", "photo2.JPG", "photos.txt", "talk.json", "two/deep.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("/im", ["/image "]),
        ("/s", ["/system ", "/set ", "/save ", "/stats"]),
        ("/image pho", ["/image photo one.png", "/image photo2.JPG"]),
        ("/image photo o", ["/image photo one.png"]),
        ("/image ~/photo2", ["/image ~/photo2.JPG"]),
        ("/image two/", ["/image two/deep.webp"]),
        ("/image t", ["/image two/"]),
        ("/image a.png photo2", ["/image a.png photo2.JPG"]),
        ("/load t", ["/load talk.json", "/load two/"]),
        ("/set top", ["/set top-k ", "/set top-p "]),
        ("What is", []),
        ("/clear t", []),
    ],
)
def test_tab_in_the_conversation(typed: str, lines: list[str]) -> None:
    found = SlashCompleter().get_completions(Document(typed), CompleteEvent(completion_requested=True))
    assert [typed[: len(typed) + each.start_position] + each.text for each in found] == lines
