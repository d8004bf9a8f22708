"""Links between the repository's pages, and the index of its decisions."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import PROGRAM
from films import encoded
from qwen2vl_q.demo.cards import example

ROOT = Path(__file__).resolve().parent.parent
DECISIONS = ROOT / "docs/decisions"
# [text](target) and [label]: target, without what leads elsewhere or into a page
LINK = re.compile(r"(?:\]\(|^\[[^\]]+\]: )(?!https?:|#)([^)#\s]+)", re.MULTILINE)

pytestmark = pytest.mark.skipif(not DECISIONS.is_dir(), reason="needs the source tree")


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *DECISIONS.glob("*.md")]
    links = [(page, target) for page in pages for target in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 60
    assert [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()] == []


def test_every_decision_stands_in_the_index_once() -> None:
    records = sorted(file.name for file in DECISIONS.glob("[0-9]*.md"))
    index = LINK.findall((DECISIONS / "README.md").read_text(encoding="utf-8"))
    assert sorted(index) == records
    assert [name[:4] for name in records] == [f"{n:04}" for n in range(1, len(records) + 1)]


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the README's lines name."""
    folder = tmp_path_factory.mktemp("cards")
    first, second, third = (example(seed)[0] for seed in (0, 2, 3))
    first.save(folder / "card-0.png")
    second.save(folder / "card-2.jpg", quality=95)
    second.save(folder / "card-2.webp", quality=95)
    third.save(folder / "card-3.gif")
    third.save(folder / "card-3.bmp")
    first.save(folder / "cards.tif", save_all=True, append_images=[second])
    first.save(folder / "cards.pdf", save_all=True, append_images=[second], resolution=150, quality=100)
    still = [np.asarray(card.resize((168, 168), Image.Resampling.BICUBIC)) for card in (first, second)]
    (folder / "cards.mp4").write_bytes(encoded([still[0]] * 20 + [still[1]] * 20, fps=10))
    return folder


def lines_of_kinds() -> list[str]:
    block = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- kinds -->\n```\n")[2]
    return block.partition("```")[0].splitlines()


@pytest.mark.parametrize("line", lines_of_kinds() if DECISIONS.is_dir() else [])
def test_each_kind_of_input_prints_what_the_readme_says(line: str, cards: Path) -> None:
    for package in ("av", "pypdfium2"):
        pytest.importorskip(package, reason="needs the extras video and pdf")
    command, _, expected = line.rpartition("# ")
    command, _, stdin = command.partition(" < ")
    data = (cards / stdin.strip()).read_bytes() if stdin else b""
    words = [*PROGRAM, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=cards, input=data, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, expected + "\n"), done.stderr.decode()
