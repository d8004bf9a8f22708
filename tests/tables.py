"""Reading what a command prints."""

from __future__ import annotations


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown table in a text, without the rule below the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if "---" not in line]
