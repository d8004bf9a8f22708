"""Files that are being written when a command is ended."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import click


@contextlib.contextmanager
def ended_by_signal(consequence: str) -> Iterator[None]:
    """Makes a termination signal an exception, so that the unfinished file is removed on the way out; says
    the consequence after Ctrl-C."""

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
        click.echo(f"interrupted: {consequence}", err=True)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
