"""Tables that several commands print."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qwen2vl_q._native import TensorInfo

_PIPE_WIDTH = 240  # wide enough that no name breaks: what reads a pipe searches lines


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for main(), where rich would end the process


def stdout_console() -> Console:
    """A console on stdout: as wide as the terminal, or wide where stdout is a file or a pipe."""
    return _Stdout(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


@dataclass
class Totals:
    """Counts and sizes of a group of tensors."""

    count: int = 0
    elements: int = 0
    n_bytes: int = 0

    def add(self, elements: int, n_bytes: int, count: int = 1) -> None:
        self.count += count
        self.elements += elements
        self.n_bytes += n_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.elements if self.elements else 0.0


def by_type(tensors: Sequence[TensorInfo]) -> dict[str, Totals]:
    """Counts and sizes of each type, largest first."""
    groups: dict[str, Totals] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type, Totals()).add(math.prod(tensor.shape), tensor.n_bytes)
    return dict(sorted(groups.items(), key=lambda item: -item[1].n_bytes))


def main_type(tensors: Sequence[TensorInfo]) -> str:
    """The type of most weights of the language model's layers, or of all tensors where it has none; "" for
    no tensors."""
    groups = by_type([tensor for tensor in tensors if tensor.name.startswith("blk.")] or tensors)
    return max(groups, key=lambda type: groups[type].elements, default="")


def bits_per_weight(tensors: Sequence[TensorInfo]) -> float:
    """The bytes of all tensors over the number of their weights; 0 for no tensors."""
    everything = Totals()
    for tensor in tensors:
        everything.add(math.prod(tensor.shape), tensor.n_bytes)
    return everything.bits_per_weight


def size_table(headings: tuple[str, ...], groups: Mapping[tuple[str, ...], Totals]) -> Table:
    """A row for each group, whose key fills the columns `headings`, and a last one for all."""
    table = Table(*headings, box=None, header_style="bold")
    for column in ("count", "parameters", "MiB", "bits/weight"):
        table.add_column(column, justify="right")

    def add_row(key: tuple[str, ...], totals: Totals, style: str | None = None) -> None:
        size, bits = f"{totals.n_bytes / 2**20:,.1f}", f"{totals.bits_per_weight:.2f}"
        table.add_row(*key, f"{totals.count}", f"{totals.elements:,}", size, bits, style=style)

    everything = Totals()
    for key, totals in groups.items():
        add_row(key, totals)
        everything.add(totals.elements, totals.n_bytes, totals.count)
    add_row(("all", *[""] * (len(headings) - 1)), everything, "bold")
    return table
