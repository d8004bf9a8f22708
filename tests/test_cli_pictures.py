"""Pictures of the command line: how they are named, dropped on the terminal, and what large ones cost."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from command_line import PROGRAM, Run
from pictures import encoded, picture
from qwen2vl_q.cli.pictures import split_dropped
from qwen2vl_q.cli.progress import StageBars

OPTIONS = ["-t", "1", "-n", "6", "--temp", "0", "-p", "What?"]


def test_names_of_pictures(
    run: Run, tiny_gguf: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    expected = run("chat", "-m", tiny_gguf, *OPTIONS, "--image", photo)
    assert expected[0] == 0
    for name in (photo.as_uri(), "~/a photo.png", f"file://localhost{photo.as_uri()[7:]}"):
        assert run("chat", "-m", tiny_gguf, *OPTIONS, "--image", name) == expected
    assert run("chat", "-m", tiny_gguf, *OPTIONS)[1] != expected[1]
    with photo.open("rb") as file:
        command = [*PROGRAM, "chat", "-m", str(tiny_gguf), *OPTIONS, "--image", "-"]
        assert subprocess.run(command, stdin=file, capture_output=True, text=True).stdout == expected[1]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--image", "file:///missing.png", "-p", "a"], 1, "/missing.png: No such file or directory"),
        (["--image", "~nobody-here/a.png", "-p", "a"], 1, "~nobody-here/a.png: No such file or directory"),
        (["--image", "-"], 2, "--image - takes stdin.*-p"),
        (["--image", "-", "-p", "-"], 2, "only one of --image, --video and -p may be -"),
        (["--image", "-", "--image", "-", "-p", "a"], 2, "only one of --image, --video and -p may be -"),
    ],
)
def test_pictures_that_are_not_there(
    run: Run, tiny_gguf: Path, options: list[str], code: int, message: str
) -> None:
    found, out, err = run("chat", "-m", tiny_gguf, *options)
    assert (found, out) == (code, "") and re.match(f"error: .*{message}", err) and err.count("\n") == 1, err


def test_stdin_that_is_no_picture(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), *OPTIONS, "--image", "-"]
    done = subprocess.run(command, input=b"text", capture_output=True)
    assert done.returncode == 1 and b"not an image" in done.stderr


# --- dropped on the terminal ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b c.JPG", "it's.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names", "question"),
    [
        ("{}/a.png", ["a.png"], ""),
        ("{}/a.png What is it?", ["a.png"], "What is it?"),
        ("'{}/a.png' What's it?", ["a.png"], "What's it?"),
        ("'{}/b c.JPG' What?", ["b c.JPG"], "What?"),
        ('"{}/b c.JPG" What?', ["b c.JPG"], "What?"),
        (r"{}/b\ c.JPG What?", ["b c.JPG"], "What?"),
        ("{}/b c.JPG What?", ["b c.JPG"], "What?"),
        ("file://{}/b%20c.JPG What?", ["b c.JPG"], "What?"),
        ("~/b c.JPG What?", ["b c.JPG"], "What?"),
        (r"'{}/it'\''s.png' What?", ["it's.png"], "What?"),
        (r"{}/it\'s.png What?", ["it's.png"], "What?"),
        ("'{}/a.png' '{}/b c.JPG'  Which?", ["a.png", "b c.JPG"], "Which?"),
        ("{}/a.png {}/b c.JPG Which?", ["a.png", "b c.JPG"], "Which?"),
        ("{}/notes.txt What?", ["notes.txt"], "What?"),
        ("What is {}/a.png?", [], "What is {}/a.png?"),
        ("{}/missing.png What?", [], "{}/missing.png What?"),
        ("a.png What?", [], "a.png What?"),
        ("'Quoted' words", [], "'Quoted' words"),
        ("'lone", [], "'lone"),
        ("https://example.org tells what?", [], "https://example.org tells what?"),
        ("/image {}/a.png", [], "/image {}/a.png"),
        ("{} what is this folder?", [], "{} what is this folder?"),
        ("x" * 100_000, [], "x" * 100_000),
        ("/\0.png What?", [], "/\0.png What?"),
    ],
)
def test_dropped_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, names: list[str], question: str
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    found = split_dropped(line.replace("{}", str(folder)))
    assert found == ([str(folder / name) for name in names], question.replace("{}", str(folder)))


def test_addresses_of_pictures_are_never_questions() -> None:
    address = "https://example.org/a.png"
    assert split_dropped(f"{address} What?") == ([address], "What?")
    with pytest.raises(FileNotFoundError):
        split_dropped("file:///missing.png What?")


def test_a_question_behind_a_dropped_file(tiny_gguf: Path, photo: Path) -> None:
    expected = subprocess.run(
        [*PROGRAM, "chat", "-m", str(tiny_gguf), *OPTIONS, "--image", str(photo)],
        capture_output=True,
        text=True,
    )
    for name in (f"'{photo}'", str(photo), photo.as_uri()):
        done = subprocess.run(
            [*PROGRAM, "chat", "-m", str(tiny_gguf), *OPTIONS[:-2]],
            input=f"{name} What?\n",
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, expected.stdout)
        assert f"{photo}: 12 tokens\n" in done.stderr


# --- large ones ---


def test_a_large_picture_says_what_it_costs(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(encoded(Image.fromarray(picture(1300, 1000))))
    arguments = ["chat", "-m", tiny_gguf, "--image", large, *OPTIONS]
    code, _, err = run(*arguments)
    assert (code, f"{large}: 1,240 tokens of 1,656 at full resolution (--vision-tokens 0)\n" in err) == (
        0,
        True,
    )
    code, _, err = run(*arguments, "--vision-tokens", "0", "-v")
    assert (code, f"{large}: 1,656 tokens\n" in err) == (0, True)
    assert "tokens" not in run(*arguments, "--vision-tokens", "0")[2].replace("after 6 tokens", "")


def test_long_stages_say_how_long_where_no_bar_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("qwen2vl_q.cli.progress.time.monotonic", lambda: now[0])
    with StageBars() as bars:
        for stage, before, seconds in (("load", 0.0, 0.1), ("image", 20.0, 2.0), ("prefill", 0.0, 1.0)):
            bars(stage, 0, 32)
            now[0] += before  # the vision tower's weights are read: no share of the work
            for done in range(33):
                bars(stage, done, 32)
                now[0] += seconds
        bars("quick", 0, 1000)
        now[0] += 0.1
        bars("quick", 1, 1000)  # too short to tell anything from
        bars("quick", 1000, 1000)
    expected = ["Looking at the image: about 62 s more", "Reading the prompt: at least 31 s more"]
    assert capsys.readouterr().err.splitlines() == expected
