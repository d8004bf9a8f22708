"""`qwen2vl-q bench --types`: a model in several types, each made, measured and compared with its source."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2vl_q.cli.bench_run import Progress, Runner
from qwen2vl_q.cli.bench_tables import Column, columns
from qwen2vl_q.cli.errors import complain, describe
from qwen2vl_q.cli.interruption import ended_by_signal
from qwen2vl_q.cli.model_file import tower_of
from qwen2vl_q.cli.type_tables import Printer, Row, plot

if TYPE_CHECKING:
    from qwen2vl_q.measure.benchmark import Part, Settings
    from qwen2vl_q.measure.conversations import Prompt
    from qwen2vl_q.measure.model_source import Source
    from qwen2vl_q.measure.verify import Output

_PARTS: tuple[Part, ...] = ("image", "prefill", "decode")  # where --only does not say others


class TypeBench:
    """Of one source."""

    def __init__(self, source: Source, folder: Path, settings: Settings, progress: Progress) -> None:
        """DeviceError for a device that is not there."""
        self._source = source
        self._folder = folder
        self._runner = Runner(settings)
        self._settings = settings
        self._progress = progress
        self._expected: list[tuple[Prompt, Output]] = []

    def rows(self, types: Sequence[str], keep: bool) -> Iterator[Row]:
        """One by one. A type that cannot be measured is named on stderr and left out. Not `keep`: files that
        are made are removed after it."""
        self._progress.begin(self._source.path)
        self._read_reference()
        for type in types:
            out = self._folder / f"{_stem(self._source)}-{type}.gguf"
            self._progress.begin(out.name)
            try:
                yield self._row(type, out)
            except Exception as error:
                if isinstance(error, BrokenPipeError):
                    raise
                self._progress.clear()
                complain(f"{type}: {describe(error)}")
            finally:
                if not keep:
                    out.unlink(missing_ok=True)

    def _read_reference(self) -> None:
        from qwen2vl_q.measure.conversations import built_in, prompt_of
        from qwen2vl_q.measure.model_source import opened
        from qwen2vl_q.measure.verify import Output, loaded

        self._progress.tell("the source's own next tokens")
        with opened(self._source) as file, loaded(file, "exact", self._settings.threads) as exact:
            for each in built_in(exact.config.vision_config is not None):
                prompt = prompt_of(exact, each, 1)
                self._expected.append((prompt, Output.of(exact, prompt)))

    def _row(self, type: str, out: Path) -> Row:
        from qwen2vl_q.measure.comparable import require_comparable
        from qwen2vl_q.measure.model_source import ModelFile, write_as
        from qwen2vl_q.measure.verify import compare_outputs, loaded

        file = ModelFile(str(out))
        if out.exists():
            self._progress.tell("the file is there")
            require_comparable(file, self._source)
        else:
            self._progress.tell("writing the file")
            write_as(self._source, type, out)
        result = self._runner.run(file.path, self._progress.tell)
        self._progress.tell("its next tokens")
        settings = result.settings
        with loaded(file, settings.precision, settings.threads, device=settings.device) as model:
            return Row(type, result, compare_outputs(self._expected, model)[1])


def _stem(source: Source) -> str:
    path = Path(source.path).resolve()
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def bench_types(
    source: str,
    types: Sequence[str],
    settings: Settings,
    folder: Path | None,
    plot_file: Path | None,
    printer: Callable[[Sequence[Column]], Printer],
) -> int:
    """Prints a row for each type and returns their number. `settings.mmproj` is the source's."""
    from qwen2vl_q.measure.model_source import source_of

    if plot_file is not None and find_spec("matplotlib") is None:
        raise click.UsageError("--plot needs matplotlib: pip install 'qwen2vl-q[plot]'")
    settings = replace(settings, only=settings.only or _PARTS)
    opened = source_of(source, settings.mmproj or tower_of(source))
    printed = printer(columns(settings, settings.only))
    with (
        ended_by_signal("the rows above are whole"),
        _folder(folder) as place,
        Progress(1 + len(types)) as progress,
    ):
        bench = TypeBench(opened, place, replace(settings, mmproj=None), progress)
        try:
            for row in bench.rows(types, keep=folder is not None):
                progress.clear()
                printed.add(row)
        finally:
            progress.clear()
            printed.close()
    if plot_file is not None and printed.rows:
        plot(printed.rows, printed.shown, plot_file)
    return len(printed.rows)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="qwen2vl-q-") as folder:
        yield Path(folder)
