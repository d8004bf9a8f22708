"""How `qwen2vl-q bench` prints what it has measured: tables, CSV, JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.device import computing_on

if TYPE_CHECKING:
    from qwen2vl_q.engine.stats import Stage
    from qwen2vl_q.measure.benchmark import Measured, Settings, Timing
    from qwen2vl_q.measure.limits import Limits


@dataclass(frozen=True)
class FileSummary:
    """Of a model's file, with the vision tower's own where there is one."""

    type: str  # of most of the language model's weights
    n_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Result:
    """A model's measurements between two of the machine's ceilings."""

    settings: Settings
    file: FileSummary
    measured: Measured
    before: Limits
    after: Limits

    @property
    def limits(self) -> Limits:
        return self.before.better(self.after).for_precision(self.measured.precision)

    def floor(self, timing: Timing) -> float | None:
        """Seconds that the work of `timing` takes at least; None for what has no floor of its own."""
        return timing.floor(self.limits)

    @property
    def parts(self) -> dict[str, list[Timing]]:
        m = self.measured
        return {
            "image": m.image,
            "question": m.question,
            "prefill": m.prefill,
            "decode": m.decode,
            "sampled": m.sampled,
            "streams": m.streams,
        }

    @property
    def timings(self) -> list[Timing]:
        return [timing for part in self.parts.values() for timing in part]

    def times_one_stream(self, timing: Timing) -> float | None:
        """How many times as fast streams together are as one; None where one has not been measured."""
        if timing not in self.measured.streams or 1 not in self.settings.streams:
            return None
        one = self.measured.streams[self.settings.streams.index(1)]
        return (timing.count / timing.median_seconds) / (one.count / one.median_seconds)

    @property
    def device(self) -> str:
        return f"{computing_on(self.measured.isa, self.measured.n_threads)}, {self.measured.precision}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned; the first row is the heading."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    cells = (map(str.ljust, line, widths) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def summary_table(results: Sequence[Result]) -> str:
    """A row for each thing measured: medians, with the least and the most in brackets."""
    rows = [("model", "what", "seconds", "tokens/s", "of the floor", "of one stream")]
    for result in results:
        m = result.measured
        name = f"{_name(result)} ({result.file.type}; {result.device})"
        rows.append((name, "load", f"{m.load_seconds:.2f}", "", "", ""))
        rows.append(("", "process start to first token", f"{m.start_seconds:.2f}", "", "", ""))
        if m.vision_load_seconds is not None:
            rows.append(("", "load of the vision tower", f"{m.vision_load_seconds:.2f}", "", "", ""))
        for timing in result.timings:
            rows.append(("", f"{timing.what} ({timing.count} tokens)", *_figures(result, timing)))
        if m.peak_memory_bytes is not None:
            rows.append(("", "peak memory", _size(m.peak_memory_bytes), "", "", ""))
    return table(rows)


# Of the parts: the column for one of the settings' wishes, and whether a figure is seconds to wait.
_COLUMNS: dict[str, tuple[str, bool]] = {
    "image": ("image {}", True),
    "question": ("{}", True),
    "prefill": ("prefill {}", False),
    "decode": ("decode at {}", False),
    "sampled": ("sampled at {}", False),
    "streams": ("{} streams", False),
}


@dataclass(frozen=True)
class Column:
    """A timing's place in `Result.parts`."""

    part: str
    index: int
    heading: str

    def cell(self, result: Result) -> str:
        timing = self.timing(result)
        return "" if timing is None else _cell(result, timing, self.is_wait)

    def timing(self, result: Result) -> Timing | None:
        timings = result.parts[self.part]
        return timings[self.index] if timings else None

    @property
    def is_wait(self) -> bool:
        return _COLUMNS[self.part][1]


def columns(settings: Settings, parts: Collection[str]) -> list[Column]:
    """For everything that was asked for of these parts."""
    wishes = _wishes(settings)
    chosen = [part for part in _COLUMNS if part in set(parts)]
    return [
        Column(part, i, _COLUMNS[part][0].format(wish))
        for part in chosen
        for i, wish in enumerate(wishes[part])
    ]


def comparison_table(results: Sequence[Result]) -> str:
    """A row for each file, and a column for everything that was asked for."""
    measured = {part for result in results for part, timings in result.parts.items() if timings}
    shown = columns(results[0].settings, measured)
    rows = [["file", "type", "size", "bits", *(column.heading for column in shown), "peak memory"]]
    for result in results:
        summary = [_name(result), result.file.type, *size_cells(result)]
        rows.append([*summary, *(column.cell(result) for column in shown), memory_cell(result)])
    return table(rows)


def size_cells(result: Result) -> tuple[str, str]:
    """The file's size, and bits a weight."""
    return _size(result.file.n_bytes), f"{result.file.bits_per_weight:.2f}"


def memory_cell(result: Result) -> str:
    memory = result.measured.peak_memory_bytes
    return "" if memory is None else _size(memory)


def _wishes(settings: Settings) -> dict[str, Sequence[object]]:
    """What each part was measured for, in the order of its timings."""
    drawn = [f"{width}x{height}" for width, height in settings.image_size]
    return {
        "image": drawn if settings.image is None else [printable(Path(settings.image).name)],
        "question": ["first token"],
        "prefill": settings.prompt_tokens,
        "decode": settings.depth,
        "sampled": settings.depth[:1],
        "streams": settings.streams,
    }


def _cell(result: Result, timing: Timing, is_wait: bool) -> str:
    """The median, and the fraction of the floor, or how many times one stream's it is."""
    floor, seconds = result.floor(timing), timing.median_seconds
    rate = timing.count / seconds
    figure = f"{_seconds(seconds)} s" if is_wait else f"{rate:.{1 if rate < 1000 else 0}f}"
    if floor is not None:
        return f"{figure} ({_percent(floor, seconds)})"
    times = result.times_one_stream(timing)
    return figure if times is None else f"{figure} ({_times(times)})"


def comparison_notes(results: Sequence[Result]) -> str:
    """What the columns mean, and the machine's limits while they were measured."""
    limits = [results[0].before, *(result.after for result in results)]

    def span(name: str, unit: str) -> str:
        rates = [getattr(each, name) for each in limits]
        return f"{_rate(min(rates), unit)} to {_rate(max(rates), unit)}"

    first = results[0]
    return "\n".join(
        (
            f"Medians of {first.settings.repeat} on {first.device}; in brackets the fraction of the floor,",
            "of streams how many times one alone.",
            "Seconds: images, and the first token of a question about one. Tokens a second: prefill,",
            "decoding, sampled decoding (temperature 1, top_p 0.9), streams (all together).",
            "Bits: of all tensors, a weight. Peak memory: of the file's own process, with all measured.",
            f"Limits: int8 {span('int8_ops_per_s', 'op/s')}, float {span('float_ops_per_s', 'FLOP/s')}, "
            f"fp32 {span('fp32_ops_per_s', 'FLOP/s')}, read {span('read_bytes_per_s', 'B/s')}.",
        )
    )


def _name(result: Result) -> str:
    return printable(Path(result.settings.model).name)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.{2 if seconds >= 1 else 3}f}"


def _figures(result: Result, timing: Timing) -> tuple[str, str, str, str]:
    floor, times = result.floor(timing), result.times_one_stream(timing)
    is_wait = timing in result.measured.question  # for a first token, whatever the number of tokens
    return (
        _spread(timing.seconds, timing.median_seconds, 2 if timing.median_seconds >= 1 else 3),
        "" if is_wait else _spread(timing.rates, timing.count / timing.median_seconds, 1),
        "" if floor is None else _percent(floor, timing.median_seconds),
        "" if times is None else _times(times),
    )


def _spread(values: Sequence[float], middle: float, digits: int) -> str:
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _percent(floor: float, seconds: float) -> str:
    return f"{100 * floor / seconds:.0f} %"


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"


def _rate(per_second: float, unit: str) -> str:
    if per_second > 1e13:
        return f"{per_second / 1e12:.1f} T{unit}"
    return f"{per_second / 1e9:.0f} G{unit}"


def limits_line(result: Result) -> str:
    def rates(limits: Limits) -> str:
        return (
            f"int8 {_rate(limits.int8_ops_per_s, 'op/s')}, float {_rate(limits.float_ops_per_s, 'FLOP/s')}, "
            f"fp32 {_rate(limits.fp32_ops_per_s, 'FLOP/s')}, read {limits.read_bytes_per_s / 1e9:.1f} GB/s"
        )

    m = result.measured
    reads = [rate for timing in (*m.decode, *m.sampled) for rate in timing.read_rates]
    decoding = (
        f" Decoding: plain reads of the weights between its runs, {min(reads) / 1e9:.1f} to "
        f"{max(reads) / 1e9:.1f} GB/s, their median."
        if reads
        else ""
    )
    return (
        f"Limits of {computing_on(m.isa, m.n_threads)}. Before: {rates(result.before)}. "
        f"After: {rates(result.after)}. Floors take the higher of each.{decoding}"
    )


def profile_table(result: Result) -> str:
    """Per stage of one run: how long, how fast, and how near to its own floor. A device's stages are of a run
    of their own, so they have shares of their sum."""
    of_timed_runs = result.measured.device == "cpu"
    rows = [("what", "stage", "calls", "ms", "share", "rate", "of its floor")]
    for timing in result.timings:
        in_stages = sum(stage.seconds for stage in timing.stages)
        total = sum(timing.seconds) / len(timing.seconds) if of_timed_runs else in_stages
        limits = timing.limits(result.limits)
        for stage in timing.stages:
            floor = limits.stage_floor(stage)
            rows.append(
                (
                    timing.what,
                    stage.name,
                    f"{stage.calls:.0f}",
                    f"{stage.seconds * 1e3:.1f}",
                    f"{100 * stage.seconds / total:.1f} %" if total else "",
                    stage_rate(limits, stage),
                    _percent(floor, stage.seconds) if floor and stage.seconds else "",
                )
            )
        if of_timed_runs:
            rest = total - in_stages
            share = f"{100 * rest / total:.1f} %"
            rows.append((timing.what, "the rest", "", f"{rest * 1e3:.1f}", share, "", ""))
    return table(rows)


def stage_rate(limits: Limits, stage: Stage) -> str:
    """In the unit of what bounds the stage."""
    compute, read = limits.compute_floor([stage]), limits.read_floor([stage])
    if not stage.seconds or not (compute or read):
        return ""
    if read > compute:
        return f"{stage.bytes / stage.seconds / 1e9:.1f} GB/s"
    return _rate((stage.int8_ops + stage.float_ops) / stage.seconds, "op/s" if stage.int8_ops else "FLOP/s")


def as_dict(result: Result, profile: bool) -> dict[str, Any]:
    """As --json prints it (bench/README.md describes the keys)."""

    def timing_dict(timing: Timing) -> dict[str, Any]:
        floor = result.floor(timing)
        fields: dict[str, Any] = {
            "what": timing.what,
            "count": timing.count,
            "seconds": list(timing.seconds),
            "median_seconds": timing.median_seconds,
            "median_tokens_per_second": timing.count / timing.median_seconds,
            "floor_seconds": floor,
            "floor_fraction": None if floor is None else floor / timing.median_seconds,
        }
        if timing in result.measured.streams:
            fields["times_one_stream"] = result.times_one_stream(timing)
        if timing.read_rates:
            fields["read_bytes_per_s"] = list(timing.read_rates)
        if profile:
            fields["stages"] = [
                {**asdict(stage), "floor_seconds": timing.limits(result.limits).stage_floor(stage)}
                for stage in timing.stages
            ]
        return fields

    m = result.measured
    return {
        "model": result.settings.model,
        "lora": [{"folder": str(folder), "scale": scale} for folder, scale in result.settings.lora],
        "device": m.device,
        "isa": m.isa,
        "n_threads": m.n_threads,
        "precision": m.precision,
        "type": result.file.type,
        "file_bytes": result.file.n_bytes,
        "bits_per_weight": result.file.bits_per_weight,
        "load_seconds": m.load_seconds,
        "start_seconds": m.start_seconds,
        "vision_load_seconds": m.vision_load_seconds,
        **{name: [timing_dict(timing) for timing in part] for name, part in result.parts.items()},
        "peak_memory_bytes": m.peak_memory_bytes,
        "limits_before": asdict(result.before),
        "limits_after": asdict(result.after),
    }


_CSV_COLUMNS = (
    *("model", "type", "file_bytes", "bits_per_weight", "device", "isa", "n_threads", "precision"),
    *("peak_memory_bytes", "what", "count", "runs", "median_seconds", "least_seconds", "most_seconds"),
    *("median_tokens_per_second", "floor_fraction", "times_one_stream"),
)


def as_csv_table(results: Sequence[Result]) -> str:
    """A row for each thing measured of each model; what does not apply is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        printed = as_dict(result, profile=False)
        for what in ("load", "start", "vision_load"):
            if (seconds := printed[f"{what}_seconds"]) is not None:
                writer.writerow({**printed, "what": what, "runs": 1, "median_seconds": seconds})
        for timing in (timing for part in result.parts for timing in printed[part]):
            seconds = timing["seconds"]
            spread = {"runs": len(seconds), "least_seconds": min(seconds), "most_seconds": max(seconds)}
            writer.writerow({**printed, **timing, **spread})
    return text.getvalue()
