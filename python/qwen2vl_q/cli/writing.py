"""What the commands that write models share: names of files to write, progress, an end by a signal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

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
    with _ended_by_signal(*outs), bar:
        task = bar.add_task(printable(outs[0].name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def _ended_by_signal(*outs: Path) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = [
        getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]  # not on Windows
    # What is ignored stays so: nohup ignores SIGHUP.
    previous = {n: signal.signal(n, end) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    except KeyboardInterrupt:
        for out in outs:
            click.echo(f"interrupted: {printable(str(out))} is not written", err=True)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
