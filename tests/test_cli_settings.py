"""/set: what the user of a conversation may choose while it goes on."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from qwen2vl_q import Qwen2VL
from qwen2vl_q.cli.conversation import Conversation
from qwen2vl_q.cli.setting_options import SETTING_OPTIONS
from qwen2vl_q.cli.settings import Settings
from qwen2vl_q.cli.slash import SlashCommands

NAMES = [
    "max-new-tokens",
    "temp",
    "top-k",
    "top-p",
    "min-p",
    "repeat-penalty",
    "seed",
    "min-pixels",
    "max-pixels",
    "vision-tokens",
    "fps",
    "max-frames",
]


@pytest.fixture
def conversation(tiny: Qwen2VL) -> Conversation:
    return Conversation(tiny, None, Settings(max_new_tokens=5))


@pytest.fixture
def commands(conversation: Conversation) -> SlashCommands:
    return SlashCommands(conversation)


def test_every_setting_is_an_option() -> None:
    assert sorted(SETTING_OPTIONS) == sorted(NAMES)
    assert [option.name for option in SETTING_OPTIONS.values()] == [field.name for field in fields(Settings)]


def test_settings_are_printed(commands: SlashCommands, capsys: pytest.CaptureFixture[str]) -> None:
    commands.run("/set")
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(NAMES)
    assert {"max-new-tokens 5", "seed drawn anew (default)", "fps 2 (default)"} <= set(lines)
    assert "vision-tokens 1,280 a picture, 5,120 a clip (default)" in lines
    commands.run("/set temp 0.7")
    commands.run("/set top_k 3")
    commands.run("/set seed 11")
    assert capsys.readouterr().err == "temp 0.7\ntop-k 3\nseed 11\n"
    commands.run("/set temp")
    commands.run("/set --temperature default")
    assert capsys.readouterr().err.splitlines()[0] == "temp 0.7"


def test_settings_count_from_the_next_question(conversation: Conversation, commands: SlashCommands) -> None:
    def asked() -> str:
        conversation.clear()
        return "".join(conversation.ask("Go on"))

    drawn = {asked() for _ in range(3)}
    commands.run("/set temp 5")
    commands.run("/set seed 1")
    first = asked()
    assert first == asked()
    commands.run("/set seed 2")
    assert asked() != first
    commands.run("/set temp default")
    commands.run("/set seed default")
    assert asked() in drawn or len(drawn) > 1
    commands.run("/set max-new-tokens 1")
    asked()
    assert conversation.cut_short() == "the answer was cut after 1 token (-n)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set top-p 2", "top-p: 2.0 is not in the range 0<x<=1."),
        ("/set temp nan", "temp: nan is not a finite number."),
        ("/set top-k 0.5", "top-k: '0.5' is not a valid integer."),
        ("/set seed -1", "seed: -1 is not in the range"),
        ("/set max-new-tokens 0", "max-new-tokens: 0 is not in the range"),
        ("/set max-pixels 1", "min_pixels"),
        ("/set colour red", "/set: expected one of .*temp.*, found colour"),
    ],
)
def test_values_out_of_range_change_nothing(
    conversation: Conversation, commands: SlashCommands, line: str, message: str
) -> None:
    before = conversation.settings
    with pytest.raises(ValueError, match=message):
        commands.run(line)
    assert conversation.settings == before


def test_bounds_of_pictures_reach_the_one_that_waits(
    conversation: Conversation, commands: SlashCommands, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.run(f"/image {photo}")
    commands.run(f"/set max-pixels {conversation.pixels(4)}")
    commands.run(f"/image {photo}")
    first, waiting, value, second = capsys.readouterr().err.splitlines()
    assert first == f"{photo}: 12 tokens" and waiting == "the picture to come: 2 tokens"
    assert value.startswith("max-pixels ") and second == f"{photo}: 2 tokens"


def test_commands_that_are_none(commands: SlashCommands) -> None:
    with pytest.raises(ValueError, match=r"no command /iamge \(did you mean /image\?\); /help lists them"):
        commands.run("/iamge a.png")
    with pytest.raises(ValueError, match="no command /zzz; /help lists them"):
        commands.run("/zzz")
