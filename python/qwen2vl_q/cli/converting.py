"""What the commands convert and quantize share: a model's source, and the report on what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.model_file import tower_file
from qwen2vl_q.cli.tables import Totals, size_table, stdout_console
from qwen2vl_q.cli.writing import gguf_path, notes_console, writing
from qwen2vl_q.convert import Adapter, GgufReport, Recipe, Report, convert_checkpoint, convert_gguf
from qwen2vl_q.engine.tower_file import TowerFile

out_argument = click.argument(
    "out", metavar="OUT.gguf", type=click.Path(dir_okay=False, path_type=Path), callback=gguf_path
)
force_option = click.option("--force", is_flag=True, help="Overwrite OUT.gguf where it exists.")


def mmproj_option(source: str) -> Callable[[Any], Any]:
    return click.option(
        "--mmproj",
        type=tower_file,
        metavar="FILE",
        help=f"The vision tower of {source}, where it has none.  [default: the one beside it]",
    )


def convert_model(
    source: str,
    mmproj: str | None,
    out: Path,
    recipe: Recipe,
    name: str | None,
    force: bool,
    n_threads: int = 0,
    adapters: Sequence[Adapter] = (),
) -> None:
    """Of a checkpoint's folder or a GGUF file; prints what was written."""
    if Path(source).suffix.lower() == ".gguf":
        report: Report | GgufReport = _convert_gguf(source, mmproj, out, recipe, name, force, n_threads)
    elif mmproj is not None:
        raise click.UsageError("--mmproj belongs to a GGUF file; a checkpoint has its vision tower")
    elif not Path(source).is_dir():
        raise click.UsageError(f"SRC: '{printable(source)}' is neither a folder nor a GGUF file")
    else:
        with writing(notes_console(), out) as progress:
            report = convert_checkpoint(Path(source), out, recipe, name, force, progress, adapters, n_threads)
    _print_report(stdout_console(), report)


def _convert_gguf(
    source: str,
    mmproj: str | None,
    out: Path,
    recipe: Recipe,
    name: str | None,
    force: bool,
    n_threads: int,
) -> GgufReport:
    tower = mmproj or TowerFile.find(source).path
    notes = notes_console()
    if tower is not None and mmproj is None:
        notes.print(f"vision tower: {printable(tower, 1000)}")
    mmproj_path = None if tower is None else Path(tower)
    with writing(notes, out) as progress:
        return convert_gguf(Path(source), mmproj_path, out, recipe, name, force, progress, n_threads)


def _print_report(console: Console, report: Report | GgufReport) -> None:
    path = printable(str(report.path))
    console.print(f"{path}: {report.n_bytes:,} bytes", highlight=False, markup=False)
    groups: dict[tuple[str, ...], Totals] = {}
    for tensor in report.tensors:
        group = groups.setdefault((tensor.mapped.role.value, tensor.output.type), Totals())
        group.add(tensor.output.n_elements, tensor.output.n_bytes)
    console.print(size_table(("tensors", "type"), groups))
    fallbacks = Counter(
        (t.mapped.role.value, t.mapped.target_shape[-1], t.wanted, t.output.type)
        for t in report.tensors
        if t.wanted != t.output.type
    )
    for (role, row, wanted, type), count in fallbacks.items():
        console.print(f"{type} instead of {wanted}: {count} of {role}, rows of {row}", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
