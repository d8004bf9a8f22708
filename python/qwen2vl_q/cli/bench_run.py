"""How `qwen2vl-q bench` measures: each model in a process of its own, the machine's ceilings in between."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.bench_tables import FileSummary, Result
from qwen2vl_q.cli.model_file import tower_of

if TYPE_CHECKING:
    from qwen2vl_q.measure.benchmark import Measured, Settings
    from qwen2vl_q.measure.limits import Limits

Tell = Callable[[str], None]


class Runner:
    """Measures models in turn on one device. Each gets the ceilings taken before and after it; what came
    after one comes before the next."""

    def __init__(self, settings: Settings) -> None:
        """DeviceError for a device that is not there."""
        from qwen2vl_q.engine.devices import cuda_index

        self._index = cuda_index(settings.device)
        # "auto" is settled here: the model must not end up on another device than the ceilings are of.
        device = "cpu" if self._index is None else f"cuda:{self._index}"
        self._settings = replace(settings, device=device)
        self._latest: Limits | None = None

    def run(self, model: str, tell: Tell) -> Result:
        """Raises what loading and running the model raise; Qwen2VLError where its process dies."""
        from qwen2vl_q.engine.tower_file import TowerFile

        # Found here, so that its size counts.
        mmproj = self._settings.mmproj or tower_of(model) or TowerFile.find(model).path
        if mmproj is not None and self._settings.mmproj is None:
            tell(f"with the vision tower {printable(mmproj, 1000)}")
        settings = replace(self._settings, model=model, mmproj=mmproj)
        file = _summary(settings)
        before = self._latest or self._limits(tell)
        measured = _in_own_process(settings, tell)
        self._latest = self._limits(tell)
        return Result(settings, file, measured, before, self._latest)

    def _limits(self, tell: Tell) -> Limits:
        from qwen2vl_q.measure.limits import Limits

        tell("what the machine can do")
        if self._index is None:
            return Limits.measure(os.environ.get("QWEN2VL_ISA", ""), self._settings.threads or 0)
        return Limits.measure_device(self._index)


def _summary(settings: Settings) -> FileSummary:
    from qwen2vl_q._native import GgufFile
    from qwen2vl_q.cli.tables import bits_per_weight, main_type

    files = [GgufFile(name) for name in (settings.model, settings.mmproj) if name is not None]
    tensors = [tensor for file in files for tensor in file.tensors]
    return FileSummary(main_type(tensors), sum(file.n_bytes for file in files), bits_per_weight(tensors))


def _in_own_process(settings: Settings, tell: Tell) -> Measured:
    from qwen2vl_q.base.errors import Qwen2VLError

    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(settings, time.time(), sender), daemon=True)
    # Ctrl-C is this process's alone, which then ends the other.
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, ctrl_c)
    sender.close()
    try:
        while isinstance(message := receiver.recv(), str):
            tell(message)
        process.join()
    except EOFError:
        raise Qwen2VLError(
            f"{printable(settings.model)}: the measuring process died (out of memory?)"
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(message, Exception):
        raise message
    return cast("Measured", message)


def _measure_and_send(settings: Settings, requested_at: float, to: Connection) -> None:
    """What is under way (strings), and at the end what was measured, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it is not inherited
    with suppress(BrokenPipeError):  # nobody listens any more
        try:
            from qwen2vl_q.measure.benchmark import measure

            outcome: Measured | Exception = measure(settings, requested_at, to.send)
        except BrokenPipeError:
            return
        except Exception as error:
            outcome = error
        to.send(outcome)


class Progress:
    """Which file and what of it, on stderr: one line that changes on a terminal, else a line for each."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._on_terminal = sys.stderr.isatty()
        self._name = ""
        self._n = 0

    def begin(self, model: str) -> None:
        self._n += 1
        place = f" ({self._n} of {self._total})" if self._total > 1 else ""
        self._name = f"{printable(Path(model).name)}{place}"

    def tell(self, phase: str) -> None:
        line = f"measuring {self._name}: {phase}"
        if self._on_terminal:
            self.clear()
            click.echo(line[: shutil.get_terminal_size().columns - 1], nl=False, err=True)
        else:
            click.echo(line, err=True)

    def clear(self) -> None:
        """Makes room for another line."""
        if self._on_terminal:
            click.echo("\r\x1b[K", nl=False, err=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
