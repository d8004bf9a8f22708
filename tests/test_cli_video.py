"""Clips on the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from command_line import PROGRAM, Run
from films import fade
from qwen2vl_q import Qwen2VL
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.pictures import split_dropped, typed_clip
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.cli.slash import SlashCommands

pytest.importorskip("av", reason="needs the extra video")
OPTIONS = ["-t", "1", "-n", "6", "--temp", "0", "-p", "What?"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a clip.mp4"
    path.write_bytes(fade(40, size=(160, 120)))
    return path


def test_a_clip_is_shown(run: Run, tiny_gguf: Path, file: Path) -> None:
    code, out, err = run("chat", "-m", tiny_gguf, *OPTIONS, "--video", file)
    assert code == 0 and out
    assert err.startswith(f"{file}: 8 frames of 392 x 280, 560 tokens (--vision-tokens, --fps)\n")
    assert run("chat", "-m", tiny_gguf, *OPTIONS, "--image", file) == (code, out, err)
    command = [*PROGRAM, "chat", "-m", str(tiny_gguf), *OPTIONS, "--video", "-"]
    piped = subprocess.run(command, input=file.read_bytes(), capture_output=True)
    assert piped.stdout.decode() == out and piped.stderr.startswith(b"-: 8 frames")


@pytest.mark.parametrize(
    ("options", "frames", "tokens"),
    [
        (["--fps", "1"], 4, 2 * 140),
        (["--max-frames", "2"], 2, 140),
        (["--vision-tokens", "300"], 4, 2 * 140),
        (["--vision-tokens", "40"], 2, 24),
        (["--vision-tokens", "0"], 8, 560),
        (["--max-pixels", "40000"], 8, 4 * 24),
    ],
)
def test_how_much_is_seen_of_it(
    run: Run, tiny_gguf: Path, file: Path, options: list[str], frames: int, tokens: int
) -> None:
    code, _, err = run("chat", "-m", tiny_gguf, *OPTIONS, "--video", file, *options)
    assert code == 0 and f": {frames} frames of " in err and f", {tokens} tokens (" in err, err


def test_parts_of_a_clip(run: Run, tiny_gguf: Path, file: Path) -> None:
    err = run("chat", "-m", tiny_gguf, *OPTIONS, "--video", f"{file}#t=1,3.05")[2]
    assert err.startswith(f"{file}#t=1,3.05: 4 frames")
    for name, start, end in (("#t=,5", None, 5.0), ("#t=1:02,1:02:03.5", 62.0, 3723.5), ("#t=7", 7.0, None)):
        options = typed_clip(f"{file}{name}", None, None).options
        assert (options.start, options.end) == (start, end)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("b.mp4", 1, "b.mp4: No such file or directory"),
        ("a clip.mp4#t=x", 2, "expected times as #t=10,25 or #t=1:02:03, found #t=x"),
        ("a clip.mp4#t=3,1", 2, "expected times in order, found #t=3,1"),
        ("a clip.mp4#t=50", 1, "a clip.mp4: no frames within 50 to inf seconds; it has 3.9"),
        ("text.mp4", 1, "text.mp4: not a video"),
    ],
)
def test_clips_that_are_none(
    run: Run, tiny_gguf: Path, file: Path, name: str, code: int, message: str
) -> None:
    (file.parent / "text.mp4").write_text("text")
    found, out, err = run("chat", "-m", tiny_gguf, *OPTIONS, "--video", file.parent / name)
    assert (found, out) == (code, "") and message in err and err.count("\n") == 1, err


def test_dropped_on_the_terminal(file: Path) -> None:
    assert split_dropped(f"'{file}' What happens?") == ([str(file)], "What happens?")


def test_saved_and_gone_on(tiny: Qwen2VL, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(max_new_tokens=5, temperature=0, vision_tokens=200)
    conversation = Conversation(tiny, None, settings)
    commands = SlashCommands(conversation)
    commands.run(f"/video {file}")
    assert capsys.readouterr().err.endswith("2 frames of 392 x 280, 140 tokens (--vision-tokens, --fps)\n")
    assert "".join(conversation.ask("What?"))
    saved = file.with_name("talk.json")
    commands.run(f"/save {saved}")
    part = json.loads(saved.read_text())[0]["content"][0]
    assert part == {
        "type": "video", "video": str(file), "nframes": 2, "resized_height": 280, "resized_width": 392
    }  # fmt: skip
    expected = "".join(conversation.ask("So?"))
    again = Conversation(tiny, None, Settings(max_new_tokens=5, temperature=0))
    again.load(saved)
    assert "".join(again.ask("So?")) == expected
    commands.run(f"/save {saved.with_suffix('.md')}")
    assert f"![]({file.as_uri()})" in saved.with_suffix(".md").read_text()


def test_a_saved_clip_is_as_it_was_whatever_the_default(
    tiny: Qwen2VL, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(tiny, None, Settings(max_new_tokens=5, temperature=0, vision_tokens=0))
    conversation.attach_clip(typed_clip(str(file), None, None))
    assert conversation.pending_tokens() == [560] and "".join(conversation.ask("What?"))
    saved = file.with_name("talk.json")
    conversation.save(saved)
    expected = "".join(conversation.ask("So?"))
    monkeypatch.setattr("qwen2vl_q.cli.conversation.CLIP_TOKENS", 100)
    again = Conversation(tiny, None, Settings(max_new_tokens=5, temperature=0))
    assert " 1 picture" in again.load(saved)
    assert (again._history[0]["content"][0]["video"].grid_thw, "".join(again.ask("So?"))) == (
        conversation._history[0]["content"][0]["video"].grid_thw, expected
    )  # fmt: skip


def test_frames_of_a_transcript_stay(tiny: Qwen2VL, photo: Path, tmp_path: Path) -> None:
    frames = {"type": "video", "video": [str(photo), str(photo)], "resized_height": 56, "resized_width": 56}
    talk = [{"role": "user", "content": [frames]}, {"role": "assistant", "content": "A"}]
    (tmp_path / "a.json").write_text(json.dumps(talk))
    conversation = Conversation(tiny, None, Settings(max_new_tokens=2))
    conversation.load(tmp_path / "a.json")
    conversation.save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == talk
    conversation.save(tmp_path / "b.md")
    assert (tmp_path / "b.md").read_text().count(photo.as_uri()) == 2


def test_clips_and_pictures_share_a_budget(tiny: Qwen2VL, file: Path, photo: Path) -> None:
    conversation = Conversation(tiny, None, Settings(vision_tokens=300))
    conversation.attach(str(photo))
    conversation.attach_clip(typed_clip(str(file), None, None))
    picture, clip = conversation.pending_tokens()
    assert 100 < clip <= 150 and picture <= 300 - clip
    conversation.set(vision_tokens=0)
    assert conversation.pending_tokens()[1] == 560
