"""Pages of PDF and TIFF files as pictures; and files that mean harm."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import Run
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.vision import documents
from qwen2vl_q.vision.documents import MAX_PAGES, MAX_PIXELS, load_pages, page_numbers, split_pages
from serving import WHAT, card

pytest.importorskip("pypdfium2", reason="needs the extra pdf")


def document(kind: str, pages: list[Image.Image]) -> bytes:
    file = io.BytesIO()
    options: dict[str, Any] = {"resolution": 150, "quality": 100, "subsampling": 0} if kind == "PDF" else {}
    pages[0].save(file, kind, save_all=True, append_images=pages[1:], **options)
    return file.getvalue()


SEEDS = (0, 2, 3, 4)  # whose cards the model knows through JPEG, too, and a pixel wider


def cards(n: int) -> list[Image.Image]:
    return [card(seed)[0] for seed in SEEDS[:n]]


@pytest.mark.parametrize(
    ("pages", "count", "expected"),
    [
        (None, 3, [1, 2, 3]),
        ("2", 3, [2]),
        ("2-3", 3, [2, 3]),
        ("2-", 3, [2, 3]),
        ("3,1-2", 3, [3, 1, 2]),
        (" 1 , 3 ", 3, [1, 3]),
    ],
)
def test_numbers_of_pages(pages: str | None, count: int, expected: list[int]) -> None:
    assert page_numbers(pages, count) == expected


@pytest.mark.parametrize(
    "pages", ["", "0", "4", "2-1", "1-4", "-2", "x", "1,,2", "1;2", "9" * 50, "1-" + "9" * 7]
)
def test_numbers_that_are_none(pages: str) -> None:
    with pytest.raises(ValueError, match="doc: expected"):
        page_numbers(pages, 3, "doc")


def test_many_pages_are_named() -> None:
    assert len(page_numbers("1-64", 1000)) == MAX_PAGES
    for pages in (None, "1-65", "1-60,70-80"):
        with pytest.raises(ValueError, match="at most 64 pages at a time"):
            page_numbers(pages, 1000)


def test_names_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_pages("a.pdf#3-5") == ("a.pdf", "3-5")
    assert split_pages("a.PDF") == ("a.PDF", None)
    assert split_pages("a#1.png") == ("a#1.png", None)
    (tmp_path / "a.pdf#1").touch()
    assert split_pages("a.pdf#1") == ("a.pdf#1", None)


@pytest.mark.parametrize("kind", ["PDF", "TIFF"])
def test_pages_are_what_they_show(kind: str, tmp_path: Path) -> None:
    """The model says what is on each."""
    data = document(kind, cards(4))
    path = tmp_path / f"cards.{kind.lower()}"
    path.write_bytes(data)
    model = Qwen2VL.from_gguf(DEMO_MODEL)
    for source in (data, path):
        found = load_pages(source, "4,2")
        assert [number for number, _ in found] == [4, 2]
        for number, picture in found:
            expected = card(SEEDS[number - 1])[0]
            assert np.abs(np.array(picture.size) - expected.size).max() <= 1
    images = model.load_pages(path, "1-2")
    for seed, image in zip(SEEDS, images, strict=False):
        content = [{"type": "image", "image": image}, {"type": "text", "text": WHAT}]
        answer = model.chat([{"role": "user", "content": content}], stream=False, temperature=0)
        assert answer == card(seed)[1]
    shared = model.load_pages(path, vision_tokens=60)
    assert len(shared) == 4
    assert sum(np.prod(image.grid_thw) // 4 for image in shared) <= 60


def test_the_command(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "cards.pdf"
    path.write_bytes(document("PDF", cards(3)))
    code, answer, errors = run("chat", "--image", f"{path}#2", "-p", WHAT, "--temp", "0", "-v")
    assert (code, answer.strip()) == (0, card(SEEDS[1])[1])
    assert f"{path}#2: " in errors
    code, _, errors = run("chat", "--image", f"{path}#7", "-p", WHAT)
    assert (code, "expected pages within 1-3, found 7" in errors) == (1, True)
    code, _, errors = run("chat", "--image", tmp_path / "none.pdf#1", "-p", WHAT)
    assert (code, "none.pdf: No such file" in errors) == (1, True)


def small_pdf(body: str, trailer: str = "", count: int = 1, box: str = "0 0 200 200") -> bytes:
    """One page with this content."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [3 0 R] /Count {count} >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents 4 0 R >>",
        f"<< /Length {len(body)} >>\nstream\n{body}\nendstream",
    ]
    text, offsets = "%PDF-1.4\n", []
    for i, item in enumerate(objects, 1):
        offsets.append(len(text))
        text += f"{i} 0 obj\n{item}\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    start = len(text)
    text += f"xref\n0 5\n0000000000 65535 f \n{table}trailer\n<< /Size 5 /Root 1 0 R {trailer} >>\n"
    return (text + f"startxref\n{start}\n%%EOF\n").encode("latin-1")


def test_a_drawing() -> None:
    [(_, picture)] = load_pages(small_pdf("1 0 0 rg 0 0 200 200 re f"))
    assert picture.size == (417, 417)
    assert picture.getpixel((200, 200)) == (255, 0, 0)


def test_encrypted() -> None:
    word = "00" * 32
    lock = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{word}> /U <{word}> /P -4 >> /ID [<00> <00>]"
    with pytest.raises(UnsupportedError, match="encrypted"):
        load_pages(small_pdf("", lock))


@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.7",
        b"%PDF-1.4\n" + b"1 0 obj\n" * 1000,
        small_pdf("")[:150],
        b"%PDF-" + bytes(range(256)) * 50,
    ],
)
def test_damaged(data: bytes) -> None:
    with pytest.raises(FormatError):
        load_pages(data, "1")


def test_a_million_pages() -> None:
    data = small_pdf("", count=10**6)
    with pytest.raises(ValueError, match="at most 64 pages"):
        load_pages(data)
    with pytest.raises((FormatError, ValueError)):
        load_pages(data, "999999")


@pytest.mark.parametrize("box", ["0 0 1000000 1000000", "0 0 14400 1", "0 0 0 0", "5 5 1 1", "0 0 1e30 1"])
def test_pages_of_any_size(box: str) -> None:
    [(_, picture)] = load_pages(small_pdf("0 g 0 0 9 9 re f", box=box))
    assert 1 <= picture.width * picture.height <= 1.1 * MAX_PIXELS


def test_a_page_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is that takes so long."""
    monkeypatch.setattr(documents, "SECONDS_A_PAGE", 0.05)
    with pytest.raises(UnsupportedError, match="not drawn within"):
        load_pages(small_pdf(""))


def test_an_interpreter_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedError, match="its interpreter has failed"):
        load_pages(small_pdf(""))


def test_tiffs_that_mean_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    data = document("TIFF", cards(2))
    with pytest.raises(FormatError):
        load_pages(data[: len(data) // 2], "2")
    with pytest.raises(ValueError, match="within 1-2"):
        load_pages(data, "3")
    with pytest.raises(ValueError, match="within 1-1"):
        load_pages(document("PNG", cards(1)), "2")
    monkeypatch.setattr(documents, "MAX_BYTES", 100)
    with pytest.raises(FileNotFoundError):
        load_pages("missing.pdf")
