"""How `qwen2vl-q bench --types` prints a row for each type: Markdown, CSV, JSON, a plot."""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.cli.bench_tables import Column, Result, as_dict, comparison_notes, memory_cell, size_cells

if TYPE_CHECKING:
    from qwen2vl_q.measure.divergence import Divergence

_WIDTH = 14  # of a column of figures: rows are printed as they come


@dataclass(frozen=True)
class Row:
    """Of a type's file, and how far its next tokens are from the source's in exact precision."""

    type: str
    result: Result
    divergence: Divergence


class Printer(ABC):
    """Prints rows as they come, so that those that are there stay where a command is ended."""

    def __init__(self, shown: Sequence[Column]) -> None:
        self.shown = shown
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.print(row)

    @abstractmethod
    def print(self, row: Row) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """After the last row, also where an exception ended them."""


class Table(Printer):
    """Markdown."""

    def print(self, row: Row) -> None:
        headings = (
            "type",
            "size",
            "bits",
            *(c.heading for c in self.shown),
            "peak memory",
            "KL",
            "same likeliest",
        )
        widths = [7, 9, 5, *(max(_WIDTH, len(c.heading)) for c in self.shown), 11, 8, 14]
        d = row.divergence
        cells = [row.type, *size_cells(row.result), *(column.cell(row.result) for column in self.shown)]
        lines: list[Sequence[str]] = [
            [*cells, memory_cell(row.result), f"{d.mean:.2g}", f"{d.agreement:.4f}"]
        ]
        if len(self.rows) == 1:
            lines[:0] = [headings, ["-" * width for width in widths]]
        for line in lines:
            click.echo(f"| {' | '.join(map(str.ljust, line, widths))} |")

    def close(self) -> None:
        if self.rows:
            tokens = self.rows[0].divergence.tokens
            click.echo(
                f"\n{comparison_notes([row.result for row in self.rows])}\n"
                f"KL: nats a token, mean over {tokens} tokens that were given, from the source's next-token\n"
                "distributions in exact precision; same likeliest: share of these tokens."
            )


class Csv(Printer):
    """A row a type; figures are seconds of what one waits for, else tokens a second."""

    def print(self, row: Row) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if len(self.rows) == 1:
            units = [f"{c.heading} {'s' if c.is_wait else 'tokens/s'}" for c in self.shown]
            ends = ("peak_memory_bytes", "kl_mean", "kl_p99", "same_likeliest")
            writer.writerow(["type", "file_bytes", "bits_per_weight", "isa", "n_threads", *units, *ends])
        file, m, d = row.result.file, row.result.measured, row.divergence
        figures = [figure(row.result, column) for column in self.shown]
        head = (row.type, file.n_bytes, file.bits_per_weight, m.isa, m.n_threads)
        writer.writerow([*head, *figures, m.peak_memory_bytes, d.mean, d.p99, d.agreement])
        click.echo(text.getvalue(), nl=False)

    def close(self) -> None:
        """Every row is out."""


class Json(Printer):
    """A list, printed at the end."""

    def __init__(self, shown: Sequence[Column], profile: bool) -> None:
        super().__init__(shown)
        self._profile = profile

    def print(self, row: Row) -> None:
        pass

    def close(self) -> None:
        click.echo(json.dumps([self._dict(row) for row in self.rows], indent=2))

    def _dict(self, row: Row) -> dict[str, Any]:
        d = row.divergence
        finite = {"kl_mean": d.mean, "kl_p99": d.p99}
        return {
            "file_type": row.type,
            **as_dict(row.result, self._profile),
            **{name: value if math.isfinite(value) else None for name, value in finite.items()},
            "same_likeliest": d.agreement,
            "compared_tokens": d.tokens,
        }


def figure(result: Result, column: Column) -> float | None:
    """Median seconds of what one waits for, else tokens a second."""
    timing = column.timing(result)
    if timing is None:
        return None
    return timing.median_seconds if column.is_wait else timing.count / timing.median_seconds


def plot(rows: Sequence[Row], shown: Sequence[Column], out: Path) -> None:
    """Divergence and every figure against the file's size, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("KL divergence, nats a token", "log", [row.divergence.mean for row in rows])]
    for column in shown:
        unit = "s" if column.is_wait else "tokens a second"
        panels.append(
            (f"{column.heading}, {unit}", "linear", [figure(row.result, column) or 0.0 for row in rows])
        )
    sizes = [row.result.file.n_bytes / 1e6 for row in rows]
    drawing, axes = pyplot.subplots(
        len(panels), 1, sharex=True, squeeze=False, figsize=(8, 2.5 * len(panels)), layout="constrained"
    )
    for panel, (label, scale, values) in zip(axes[:, 0], panels, strict=True):
        panel.plot(sizes, values, "o")
        for row, size, value in zip(rows, sizes, values, strict=True):
            panel.annotate(row.type, (size, value), xytext=(5, 4), textcoords="offset points")
        panel.margins(0.1, 0.2)
        panel.set(yscale=scale, ylabel=label)
        if scale == "linear":
            panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[-1, 0].set(xlabel="file, MB")
    drawing.savefig(out)
    pyplot.close(drawing)
