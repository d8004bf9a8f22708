"""A picture from everything that can hold one."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import Run
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.vision import image_processor
from qwen2vl_q.vision.fetch import Fetcher
from qwen2vl_q.vision.image_processor import load_image
from serving import WHAT, card, png


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = png(card(0)[0])
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://cards.example:{server.server_port}/card.png"
    server.shutdown()
    thread.join()
    server.server_close()


def local(**more: Any) -> Fetcher:
    return Fetcher(frozenset({"*"}), allow_private=True, resolve=lambda host, port: ["127.0.0.1"], **more)


def test_every_source_is_the_same_picture(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model says what is on it."""
    picture, truth = card(0)
    data = png(picture)
    path = tmp_path / "a card.png"
    path.write_bytes(data)
    monkeypatch.setenv("HOME", str(tmp_path))
    pixels = np.asarray(picture)
    encoded = base64.b64encode(data).decode()
    sources: list[dict[str, Any]] = [
        {"image": str(path)},
        {"path": path.name and str(path)},
        {"image": "~/a card.png"},
        {"image": path.as_uri()},
        {"url": address},
        {"image": address},
        {"image": f"data:image/png;base64,{encoded}"},
        {"image": f"data:image;base64,{encoded}"},
        {"base64": encoded},
        {"image": data},
        {"image": bytearray(data)},
        {"image": io.BytesIO(data)},
        {"image": picture},
        {"image": pixels},
        {"image": (pixels / 255).astype(np.float32)},
        {"image": pixels / 255.0},
        {"image": np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])},
    ]
    model = Qwen2VL.from_gguf(DEMO_MODEL, fetch=local())
    keys = set()
    for source in sources:
        part = {"type": "image", **source}
        [image] = model.encode_chat([{"role": "user", "content": [part]}])[1]
        keys.add(image.key)
    assert len(keys) == 1
    part = {"type": "image_url", "image_url": {"url": address}}
    asked = [{"role": "user", "content": [part, {"type": "text", "text": WHAT}]}]
    assert model.chat(asked, stream=False, temperature=0) == truth


def test_nothing_is_fetched_unless_it_may_be(tiny: Qwen2VL, tiny_gguf: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image", "image": "https://example.org/a.png"}]}]
    with pytest.raises(ValueError, match=r"nothing is fetched from the network.*fetch=True"):
        tiny.encode_chat(messages)
    model = Qwen2VL.from_gguf(tiny_gguf, fetch=Fetcher(frozenset({"cards.example"})))
    with pytest.raises(ValueError, match=r"example\.org is not among the hosts"):
        model.encode_chat(messages)
    messages[0]["content"][0]["image"] = "http://127.0.0.1/a.png"  # type: ignore[index]
    with pytest.raises(ValueError, match="not public"):
        Qwen2VL.from_gguf(tiny_gguf, fetch=True).encode_chat(messages)
    with pytest.raises(ValueError, match="expected True, False or a Fetcher"):
        Qwen2VL.from_gguf(tiny_gguf, fetch="yes")  # type: ignore[arg-type]


def test_the_command_fetches_what_is_typed(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, errors = run("chat", "--image", address.replace("cards.example", "127.0.0.1"), "-p", WHAT)
    assert (code, "not public" in errors) == (1, True)
    from qwen2vl_q.vision import fetch

    monkeypatch.setattr(fetch, "Fetcher", lambda hosts: local())
    code, answer, errors = run("chat", "--image", address, "-p", WHAT, "--temp", "0")
    assert (code, answer.strip()) == (0, card(0)[1])
    assert f"fetching {address}" in errors
    code, printed, _ = run("ground", address, "the black diamond")
    assert (code, printed.startswith("the black diamond: ")) == (0, True)


@pytest.mark.parametrize(
    "array",
    [
        np.full((4, 4), 1.5),
        np.full((4, 4), -0.1),
        np.full((4, 4), np.nan),
        np.zeros((4, 4), np.int32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4)),
    ],
)
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match="array"):
        load_image(array)


def test_floats_are_rounded() -> None:
    levels = np.arange(256, dtype=np.float64)[None] / 255
    for shift in (-0.49 / 255, 0.0, 0.49 / 255):
        found = np.asarray(load_image(np.clip(levels + shift, 0, 1)))
        np.testing.assert_array_equal(found[:, :, 0], np.arange(256, dtype=np.uint8)[None])


def test_first_frames_count() -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(file.getvalue()).getpixel((0, 0)) == (255, 0, 0), kind


def test_avif() -> None:
    if "AVIF" not in image_processor.FORMATS:
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, "AVIF")
    assert load_image(file.getvalue()).size == (64, 48)


def test_heic() -> None:
    """What a phone writes, with the package of the extra heif."""
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    heif.register_heif_opener()
    file = io.BytesIO()
    sheet = Image.new("RGB", (64, 48), (200, 30, 30))
    sheet.paste((30, 30, 200), (0, 0, 32, 48))
    sheet.save(file, "HEIF", quality=95)
    found = np.asarray(load_image(file.getvalue())).astype(int)
    assert found.shape == (48, 64, 3)
    assert np.abs(found[24, 8] - (30, 30, 200)).max() < 16
    assert np.abs(found[24, 56] - (200, 30, 30)).max() < 16


def test_heic_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'qwen2vl-q\[heif\]'"):
        load_image(b"\x00\x00\x00\x18ftypheic" + bytes(100))
