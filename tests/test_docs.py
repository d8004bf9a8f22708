"""Links between the repository's pages, and the index of its decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
