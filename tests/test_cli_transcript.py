"""/save and /load: conversations as files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_q import FormatError, Qwen2VL
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.cli.slash import SlashCommands


@pytest.fixture
def conversation(tiny: Qwen2VL) -> Conversation:
    return Conversation(tiny, "Be brief.", Settings(max_new_tokens=5, temperature=0))


@pytest.fixture
def folder(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a picture."""
    shutil.copy(photo, tmp_path / "a photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question))


def test_a_conversation_goes_on_from_another_folder(
    conversation: Conversation,
    tiny: Qwen2VL,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation.attach("a photo.png")
    ask(conversation, "What?")
    ask(conversation, "And?")
    commands = SlashCommands(conversation)
    commands.run("/save talk.json")
    commands.run("/save talk.md")
    expected = ask(conversation, "So?")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    again = Conversation(tiny, None, conversation.settings)
    capsys.readouterr()
    monkeypatch.setenv("HOME", str(folder))
    again.attach(str(folder / "a photo.png"))  # is forgotten
    SlashCommands(again).run("/load ~/talk.json")
    assert capsys.readouterr().err.startswith(f"{folder}/talk.json: 5 messages, 1 picture, ")
    assert again.system == "Be brief." and again.pending_tokens() == [] and ask(again, "So?") == expected
    saved = json.loads((folder / "talk.json").read_text())
    assert tiny.chat([*saved, {"role": "user", "content": "So?"}], stream=False, max_new_tokens=5) == expected
    assert f"![]({(folder / 'a photo.png').as_uri()})" in (folder / "talk.md").read_text()


def test_pictures_keep_their_bounds(conversation: Conversation, tiny: Qwen2VL, folder: Path) -> None:
    conversation.set(max_pixels=conversation.pixels(4))
    conversation.attach("a photo.png")
    ask(conversation, "What?")
    conversation.save(Path("talk.json"))
    again = Conversation(tiny, None, Settings(max_new_tokens=5, temperature=0))
    again.load(Path("talk.json"))
    ask(again, "And?")
    assert tiny.last_stats.reused_tokens > 10
    again.save(Path("again.json"))
    first, second = (json.loads(Path(name).read_text()) for name in ("talk.json", "again.json"))
    assert second[: len(first)] == first


def test_relative_pictures_and_data_uris(conversation: Conversation, folder: Path, photo: Path) -> None:
    import base64

    data = f"data:image/png;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": "a photo.png"},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": "Same?"},
    ]
    (folder / "deep").mkdir()
    shutil.move("a photo.png", "deep")
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]
    Path("deep/talk.json").write_text(json.dumps(messages))
    assert "2 messages, 2 pictures" in conversation.load(Path("deep/talk.json"))
    assert conversation.system == "Be brief."  # the file has none
    conversation.save(Path("second.json"))
    assert "2 messages" not in conversation.load(Path("second.json"))  # the system prompt makes three


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not a conversation: Expecting value"),
        ("[" * 100_000, "not a conversation: "),
        ("[]", "not a conversation: messages must not be empty"),
        ("{}", "not a conversation: messages must be a list"),
        ('[{"role": "user", "content": "a"}]', "in turns, found user"),
        ('[{"role": "assistant", "content": "a"}]', "in turns, found assistant"),
        ('[{"role": "system", "content": [{"type": "text", "text": "a"}]}]', "system prompt as a string"),
        ('[{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]', "message 0"),
        ("\udcff", "not a conversation: "),
    ],
)
def test_files_that_are_no_conversations(
    conversation: Conversation, folder: Path, text: str, message: str
) -> None:
    ask(conversation, "Go on")
    Path("talk.json").write_text(text, errors="surrogateescape")
    with pytest.raises(FormatError, match=f"talk.json: .*{message}"):
        conversation.load(Path("talk.json"))
    conversation.save(Path("kept.json"))
    assert len(json.loads(Path("kept.json").read_text())) == 3


def test_a_conversation_that_cannot_go_on_changes_nothing(conversation: Conversation, folder: Path) -> None:
    ask(conversation, "Go on")
    conversation.save(Path("kept.json"))
    long = [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "a"}]
    lost = [
        {"role": "user", "content": [{"type": "image", "image": "lost.png"}]},
        {"role": "assistant", "content": "a"},
    ]
    for messages, error, message in (
        (long, ValueError, r"takes \d+ tokens, but the context holds 2048 \(--ctx\)"),
        (lost, FileNotFoundError, "lost.png"),
    ):
        Path("talk.json").write_text(json.dumps(messages))
        with pytest.raises(error, match=message):
            conversation.load(Path("talk.json"))
    with pytest.raises(FileNotFoundError):
        conversation.load(Path("missing.json"))
    conversation.save(Path("again.json"))
    assert Path("again.json").read_text() == Path("kept.json").read_text()


def test_what_save_refuses(conversation: Conversation, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(conversation, "Go on")
    before = Path("a photo.png").read_bytes()
    for name in ("a photo.png", "talk", ".json"):
        with pytest.raises(ValueError, match=r"expected a name that ends in \.json or \.md"):
            conversation.save(Path(name))
    assert Path("a photo.png").read_bytes() == before
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        conversation.save(Path("nowhere/talk.json"))
    conversation.save(Path("talk.json"))
    good = Path("talk.json").read_bytes()

    def half(self: Path, text: str, **options: Any) -> None:
        self.write_bytes(text.encode()[:10])
        raise OSError("no space")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        conversation.save(Path("talk.json"))
    assert Path("talk.json").read_bytes() == good
    assert sorted(path.name for path in folder.iterdir()) == ["a photo.png", "talk.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are not bytes")
def test_pictures_whose_names_are_not_utf_8(conversation: Conversation, folder: Path, photo: Path) -> None:
    name = os.fsdecode(b"p\xff\xe4.png")
    shutil.copy(photo, name)
    conversation.attach(name)
    ask(conversation, "Größe?")
    conversation.save(Path("talk.json"))
    conversation.save(Path("talk.md"))
    assert "Größe?" in Path("talk.json").read_text(encoding="utf-8")
    assert "1 picture" in conversation.load(Path("talk.json"))
