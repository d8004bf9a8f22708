"""Messages of transformers and of the OpenAI API."""

from __future__ import annotations

import base64
import io
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from pictures import encoded, picture
from qwen2vl_q.chat import messages as module
from qwen2vl_q.chat.messages import ImagePart, TextPart, ToolCall, normalize, read_source
from qwen2vl_q.vision.image_processor import ImageProcessor

PNG = encoded(Image.fromarray(picture(40, 30)))
BASE64 = base64.b64encode(PNG).decode()


def image_of(part: dict[str, Any]) -> ImagePart:
    [message] = normalize([{"role": "user", "content": [part]}])
    [image] = message.visuals
    assert isinstance(image, ImagePart)
    return image


def test_texts() -> None:
    given: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "b", "refusal": None},
    ]
    system, user, assistant = normalize(given)
    assert (system.role, system.content) == ("system", "s")
    assert user.content == (TextPart("a"), TextPart(""))
    assert assistant.for_template() == {"role": "assistant", "content": "b"}
    assert user.for_template() == given[1]
    assert user.visuals == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
    ],
)
def test_paths(part: dict[str, Any]) -> None:
    assert image_of(part).image == "a.png"


def test_pictures_in_memory_stay_as_they_are() -> None:
    array = picture(40, 30)
    for source in (
        io.BytesIO(PNG),
        bytearray(PNG),
        memoryview(PNG),
        PNG,
        Image.fromarray(array),
        array,
        Path("a.png"),
        ImageProcessor().process(array),
    ):
        assert image_of({"type": "image", "image": source}).image is source


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image", "image": f"DATA:image/png;name=x;BASE64,{BASE64[:50]}\n{BASE64[50:]}"},
        {"type": "image", "image": f"data:;base64,{BASE64.replace('+', '%2B')}"},
        {"type": "image", "base64": BASE64},
        {"type": "image", "image": "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG)},
    ],
)
def test_data_uris(part: dict[str, Any]) -> None:
    assert image_of(part).image == PNG


def test_file_addresses(tmp_path: Path) -> None:
    path = tmp_path / "a b%.png"
    assert read_source(path.as_uri()) == str(path)
    assert read_source(f"file://localhost{path.as_uri()[7:]}") == str(path)
    with pytest.raises(ValueError, match=r"another machine \(server\)"):
        read_source("file://server/share/a.png")


@pytest.mark.parametrize("address", ["http://example.com/a.png", "HTTPS://example.com/a.png"])
def test_nothing_is_fetched(address: str) -> None:
    with pytest.raises(ValueError, match="message 0, part 0: nothing is fetched from the network"):
        image_of({"type": "image_url", "image_url": {"url": address}})


@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_percent_encoding(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    for text in ("", "%", "%4", "%41", "a%4", "%%41", "%zz%4g%41%c3%A9", "%41" * 50, "a%2", "é%00%ff" * 9):
        assert read_source("data:," + text) == unquote_to_bytes(text)


def test_size_of_a_data_uri_is_bounded() -> None:
    """Before anything is decoded, and with little memory: `unquote_to_bytes` takes 80 bytes for each."""
    n = module.MAX_DATA_URI_BYTES
    for uri in (
        "data:;base64," + "A" * (2 * n),
        "data:;base64," + "%41" * (n // 3 * 4 + 8),
        "data:," + "A" * (n + 1),
        "data:," + "%41" * (n + 1),
    ):
        with pytest.raises(ValueError, match="more than 64 MiB"):
            read_source(uri)
    tracemalloc.start()
    try:
        for uri in (
            "data:," + "%41" * 2**20,
            "data:;base64," + "%41" * 2**20,
            "data:;base64," + "A A " * 2**19,
        ):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            read_source(uri)
            assert tracemalloc.get_traced_memory()[1] - before < 40 * 2**20
    finally:
        tracemalloc.stop()


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert read_source("~/a.png") == str(tmp_path) + "/a.png"
    assert image_of({"type": "image", "path": "~/a.png"}).image == str(tmp_path) + "/a.png"
    Path("~a.png").touch()
    assert read_source("~a.png") == "~a.png"
    assert read_source(Path("~/a.png")) == Path("~/a.png")
    assert read_source("~nobody-of-that-name/a.png") == "~nobody-of-that-name/a.png"


def test_a_path_is_short() -> None:
    with pytest.raises(ValueError, match=r"^image: expected a path, found 5000 characters; give base64"):
        read_source("A" * 5000)


def test_bounds() -> None:
    part = image_of({"type": "image", "image": "a.png", "min_pixels": 784, "max_pixels": 7840})
    assert (part.min_pixels, part.max_pixels) == (784, 7840)
    for bad in (0, "many", 1.5, True, 10**13):
        with pytest.raises(ValueError, match="message 0, part 0: max_pixels: expected an integer of 1 to"):
            image_of({"type": "image", "image": "a.png", "max_pixels": bad})


def test_sizes() -> None:
    sizes = {"min_pixels": 1, "max_pixels": 2, "resized_height": 3, "resized_width": 4, "detail": "low"}
    part = image_of({"type": "image", "image": "a.png", **sizes})
    assert (part.resized, part.detail) == ((3, 4), "low")
    assert part.for_message() == {"type": "image", "image": "a.png", **sizes}
    beside = image_of({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}})
    assert beside.for_message() == {"type": "image", "image": "a.png", "detail": "low"}
    for bad, match in (
        ({"resized_height": 3}, "expected resized_height and resized_width together"),
        ({"resized_height": 0, "resized_width": 3}, "resized_height: expected an integer of 1 to"),
        ({"detail": "fine"}, "expected the detail low, high or auto, found fine"),
    ):
        with pytest.raises(ValueError, match=f"^message 0, part 0: {match}"):
            image_of({"type": "image", "image": "a.png", **bad})


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "must not be empty"),
        ("hello", "a list of messages, found str"),
        ({"role": "user", "content": "a"}, "a list of messages, found dict"),
        (["hello"], "message 0: expected a dict"),
        (
            [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}],
            "message 1: expected the role .* found robot",
        ),
        ([{"content": "a"}], "message 0: expected the role system, user, assistant, tool, found None"),
        ([{"role": "user"}], "message 0: expected content as text or a list of parts, found NoneType"),
        ([{"role": "user", "content": b"a"}], "message 0: .*found bytes"),
        ([{"role": "user", "content": ["a"]}], "message 0, part 0: expected a dict, found str"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "part 0: expected text as a string, found NoneType",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part 0: expected the type .*, found audio"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "part 0: expected one of image, url, path and base64",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": 3}]}],
            "part 0: expected a path.* found int",
        ),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part 0: expected image_url with a url"),
        ([{"role": "user", "content": [{"type": "image", "base64": "?"}]}], "part 0: not base64"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "data:x"}]}],
            "part 0: a data: URI without",
        ),
    ],
)
def test_what_is_no_message(messages: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        normalize(messages)


PART: dict[Any, Any] = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (
            {"content": "a", "images": ["a.png"]},
            "message 0: unknown key images; write each picture as a part",
        ),
        ({"content": "a", "name": "me"}, "message 0: unknown key name; write it into the content"),
        ({"content": "a", "\x1b[1m" + "x" * 10**6: 1}, r"message 0: unknown key \\x1b\[1mx{116}... \(10"),
        (
            {"content": [{"type": "text", "text": "a", "cache_control": {}}]},
            "part 0: unknown key cache_control$",
        ),
        (
            {"content": [{"type": "image_url", "image_url": "a", "detail": "low"}]},
            "detail; it belongs beside",
        ),
        ({"content": "a", "tool_calls": []}, "message 0: unknown key tool_calls; they are an assistant's$"),
        ({"content": "a", "tool_call_id": "b"}, "tool_call_id; it belongs to the role tool$"),
        ({"content": [{**PART, 3: 3}]}, "part 0: unknown key 3$"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "a.png", "format": "png"}}]},
            "part 0, image_url: unknown key format$",
        ),
    ],
)
def test_unknown_keys_are_refused(message: dict[Any, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        normalize([{"role": "user", **message}])
    assert len(str(caught.value)) < 300
    nothing: dict[Any, Any] = {key: None for key in message if key != "content"}
    assert normalize([{**nothing, "role": "user", "content": "a"}])[0].content == "a"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "\x1b[2J" + "x" * 10**6, "content": "a"},
        {"role": "user", "content": [{"type": "\x1b[2J" + "x" * 10**6}]},
        {"role": "user", "content": [{**PART, "max_pixels": "\x1b[2J" + "x" * 10**6}]},
        {"role": "user", "content": [{**PART, "max_pixels": -(10**5000)}]},
        {"role": "user", "content": [{**PART, "image": "http://\x1b[2J" + "x" * 10**6}]},
        {"role": "user", "content": [{**PART, "image": "file://\x1b[2J" + "x" * 10**6 + "/a.png"}]},
        {"role": "user", "content": [{**PART, "image": "file://\x1b2J" + "x" * 10**6 + "/a.png"}]},
        {"role": "user", "content": [{"type": "image", "base64": "\x9b2J" * 10**6}]},
    ],
)
def test_errors_quote_little(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^message 0") as caught:
        normalize([message])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_arrays_are_not_lists_of_parts() -> None:
    with pytest.raises(ValueError, match="found ndarray"):
        normalize([{"role": "user", "content": np.zeros(3)}])


# --- tools ---

TEXT = {"type": "text", "text": "blue"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}


def called(arguments: Any) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": "a", "arguments": arguments}}]}


def test_calls_and_their_results() -> None:
    as_object = {"function": {"name": "look", "arguments": {"at": "sky"}}}
    said, result = normalize(
        [
            {"role": "assistant", "content": None, "tool_calls": [CALL, as_object]},
            {
                "role": "tool",
                "content": [{"type": "text", "text": "blue"}],
                "tool_call_id": "c1",
                "name": "look",
            },
        ]
    )
    assert said.tool_calls == (ToolCall("look", '{"at": "sky"}'),) * 2
    assert [call.id for call in said.tool_calls] == ["c1", ""]
    assert said.texts == ["", '{"at": "sky"}', '{"at": "sky"}']
    for_template = said.for_template()["tool_calls"][0]
    assert for_template == {**CALL, "function": {"name": "look", "arguments": {"at": "sky"}}}
    assert said.tool_calls[0].for_message() == CALL
    assert result.for_template()["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": None}, "expected content as text or a list of parts, found NoneType"),
        ({"tool_calls": CALL}, "message 0: tool_calls: expected a list, found dict"),
        ({"tool_calls": ["look"]}, "tool call 0: expected a function with a name, found look"),
        ({"tool_calls": [{"function": {"name": 3}}]}, "tool call 0: expected a function with a name"),
        ({"tool_calls": [{**CALL, "index": 0}]}, "tool call 0: unknown key index"),
        (called("{"), "arguments: not JSON: Expecting"),
        (called("[" * 10**5), "arguments: not JSON"),
        (called("[]"), "expected an object as arguments"),
        (
            {"tool_calls": [{"function": {"name": "a", "arguments": {"b": {1}}}}]},
            "arguments: expected text, .* set",
        ),
        (
            {"tool_calls": [{"function": {"name": "a", "arguments": {"\ud800": 1}}}]},
            "text with half a surrogate pair",
        ),
        (
            {"tool_calls": [{"function": {"name": "a", "arguments": '{"\\ud800": 1}'}}]},
            "half a surrogate pair",
        ),
        ({"role": "tool", "content": [PART]}, "expected text as a tool's result, found a picture"),
        ({"role": "tool", "content": "a", "tool_call_id": 3}, "expected tool_call_id as a string, found int"),
    ],
)
def test_what_is_no_call(message: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        normalize([{"role": "assistant", **message}])
