"""qwen2vl-q convert: a Hugging Face checkpoint becomes one GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.interruption import ended_by_signal
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.tables import Totals, size_table, stdout_console
from qwen2vl_q.convert import FILE_TYPES, FileType, Recipe, Report, convert_checkpoint
from qwen2vl_q.hub.models import Models
from qwen2vl_q.hub.names import HubName


def _gguf_path(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix != ".gguf":  # also keeps --force from overwriting a checkpoint's own files
        raise click.BadParameter(f"'{printable(str(value))}' does not end in .gguf")
    folder = value.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"there is no folder '{printable(str(folder))}'")
    return value


@click.command(short_help="Convert a Hugging Face checkpoint to one GGUF file.")
@click.argument("source", metavar="SRC")
@click.argument(
    "out", metavar="OUT.gguf", type=click.Path(dir_okay=False, path_type=Path), callback=_gguf_path
)
@click.option(
    "--type",
    "type_",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    default="q4_0",
    show_default=True,
    help="Of the weights.",
)
@click.option(
    "--vision-type",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    help="Of the vision tower's weights.  [default: q8_0 in q4_0 files, else as --type]",
)
@click.option("--name", help="The model's name in the file.  [default: from SRC]")
@click.option("--force", is_flag=True, help="Overwrite OUT.gguf where it exists.")
def convert(
    source: str, out: Path, type_: FileType, vision_type: FileType | None, name: str | None, force: bool
) -> None:
    """Convert a Qwen2-VL checkpoint to one GGUF file.

    SRC is a folder as the Hugging Face hub has it (config.json, safetensors, tokenizer), or the name of a
    model there, owner/name[@REVISION], which is then downloaded into the hub's cache. The file holds the
    language model, the vision tower, the tokenizer, the chat template, and the limits and defaults of both.

    Norms and biases stay F32. In q4_0 files the embeddings and the head are Q6_K, the vision tower Q8_0. A
    matrix whose rows a type's blocks do not divide gets a wider type; the table at the end says which.

    \b
    Examples:
      qwen2vl-q convert Qwen/Qwen2-VL-2B-Instruct qwen2-vl-2b.gguf
      qwen2vl-q convert ./my-finetune my-finetune-q8_0.gguf --type q8_0
      qwen2vl-q convert ./my-finetune m.gguf --type q4_0 --vision-type f16 --force
    """
    if out.exists() and not force:  # before a download, not after
        raise click.UsageError(f"{printable(str(out))} exists: pass --force to overwrite it")
    notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if not Path(source).exists() and HubName.reads_as(source):
        asked = HubName.parse(source)
        if asked.type:
            raise click.UsageError(f"SRC: the type of OUT.gguf is --type's, found {printable(source)}")
        folder, name = Models(tell=say).checkpoint(asked), name or asked.title
    elif not Path(source).is_dir():
        raise click.UsageError(f"SRC: '{printable(source)}' is not a folder")
    else:
        folder = Path(source)
    with ended_by_signal(f"{printable(str(out))} is not written"), _progress(notes) as progress:
        task = progress.add_task(printable(out.name), total=None)
        report = convert_checkpoint(
            folder,
            out,
            Recipe(type_, vision_type),
            name,
            force,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    _print_report(stdout_console(), report)


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _print_report(console: Console, report: Report) -> None:
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
