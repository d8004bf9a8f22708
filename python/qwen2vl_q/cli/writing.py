"""What the commands that write models share: names of files to write, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


def gguf_path(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix != ".gguf":  # also keeps --force from overwriting a checkpoint's own files
        raise click.BadParameter(f"'{printable(str(value))}' does not end in .gguf")
    require_folder(value)
    return value


def require_folder(out: Path) -> None:
    folder = out.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"there is no folder '{printable(str(folder))}'")


def require_new(*outs: Path) -> None:
    for out in outs:
        if out.exists():
            raise click.UsageError(f"{printable(str(out))} exists: pass --force to overwrite it")


def notes_console() -> Console:
    return Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def writing(console: Console, *outs: Path) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done of bytes in all, which what it yields is told. A termination signal is an exception
    inside, so that unfinished files are removed on the way out; Ctrl-C is told of."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    names = " and ".join(printable(str(out)) for out in outs)
    with ended_by_signal(f"{names} {'is' if len(outs) == 1 else 'are'} not written"), bar:
        task = bar.add_task(printable(outs[0].name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
