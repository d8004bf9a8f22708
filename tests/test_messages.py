"""Messages of transformers and of the OpenAI API."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pictures import encoded, picture
from qwen2vl_q import messages as module
from qwen2vl_q.image_processor import ImageProcessor
from qwen2vl_q.messages import ImagePart, TextPart, normalize, read_source

PNG = encoded(Image.fromarray(picture(40, 30)))
BASE64 = base64.b64encode(PNG).decode()


def image_of(part: dict[str, Any]) -> ImagePart:
    [message] = normalize([{"role": "user", "content": [part]}])
    [image] = message.images
    return image


def test_texts() -> None:
    given: list[dict[str, Any]] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "content": "b", "name": "ignored"},
    ]
    system, user, assistant = normalize(given)
    assert (system.role, system.content) == ("system", "s")
    assert user.content == (TextPart("a"), TextPart(""))
    assert assistant.for_template() == {"role": "assistant", "content": "b"}
    assert user.for_template() == given[1]
    assert user.images == []


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
    for source in (PNG, Image.fromarray(array), array, Path("a.png"), ImageProcessor().process(array)):
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


def test_size_of_a_data_uri_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DATA_URI_BYTES", 2**20)
    for uri in ("data:;base64," + "A" * (2 * 2**20), "data:," + "A" * (4 * 2**20)):
        with pytest.raises(ValueError, match="more than 1 MiB"):
            read_source(uri)


def test_bounds() -> None:
    part = image_of({"type": "image", "image": "a.png", "min_pixels": 784, "max_pixels": 7840})
    assert (part.min_pixels, part.max_pixels) == (784, 7840)
    for bad in (0, "many", 1.5, True):
        with pytest.raises(ValueError, match="message 0, part 0: expected max_pixels as a positive integer"):
            image_of({"type": "image", "image": "a.png", "max_pixels": bad})


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "must not be empty"),
        ("hello", "a list of messages, found str"),
        ({"role": "user", "content": "a"}, "a list of messages, found dict"),
        (["hello"], "message 0: expected a dict"),
        (
            [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}],
            "message 1: expected the role .* 'tool'",
        ),
        ([{"content": "a"}], "message 0: expected the role system, user, assistant, found None"),
        ([{"role": "user"}], "message 0: expected content as text or a list of parts, found NoneType"),
        ([{"role": "user", "content": b"a"}], "message 0: .*found bytes"),
        ([{"role": "user", "content": ["a"]}], "message 0, part 0: expected a dict, found str"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "part 0: expected text as a string, found NoneType",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part 0: expected the type .*, found 'audio'"),
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


def test_arrays_are_not_lists_of_parts() -> None:
    with pytest.raises(ValueError, match="found ndarray"):
        normalize([{"role": "user", "content": np.zeros(3)}])
