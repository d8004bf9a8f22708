"""qwen2vl-q bench: how fast a model's file runs on this machine, and how near to what the machine can do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.cli.device import computing_on, device_option, print_note
from qwen2vl_q.cli.model_file import model_file

if TYPE_CHECKING:
    from qwen2vl_q.benchmark import Measured, Settings, Timing
    from qwen2vl_q.limits import Limits, Stage


def _numbers(least: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """An option's callback: numbers with commas between, "512,2048"; none where it is not given."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
        if value is None:
            return ()
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"expected numbers with commas between, found {value!r}") from None
        if min(numbers) < least:
            raise click.BadParameter(f"expected {least} or more, found {min(numbers)}")
        return numbers

    return parse


def _sizes(ctx: click.Context, param: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    """An option's callback: sizes of pictures with commas between, "1024x683,2048x1536"."""
    sizes = []
    for part in value.split(","):
        width, _, height = part.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise click.BadParameter(f"expected sizes such as 1024x683, found {part!r}")
        sizes.append((int(width), int(height)))
    return tuple(sizes)


@dataclass(frozen=True)
class Result:
    """A model's measurements between two of the machine's ceilings."""

    settings: Settings
    file_bytes: int
    measured: Measured
    before: Limits
    after: Limits

    @property
    def limits(self) -> Limits:
        return self.before.better(self.after).for_precision(self.measured.precision)

    def floor(self, timing: Timing) -> float | None:
        """Seconds that the work of `timing` takes at least; None for what has no floor of its own."""
        match timing.what.split()[0]:
            case "image":
                return self.limits.image_floor(timing.stages)
            case "prefill":
                return self.limits.prefill_floor(timing.stages)
            case "decode":
                return self.limits_of(timing).decode_floor(timing.stages)
        return None

    def limits_of(self, timing: Timing) -> Limits:
        """With memory as fast as the model's own weights were read between the runs, where they were."""
        if not timing.read_rates:
            return self.limits
        return replace(self.limits, read_bytes_per_s=median(timing.read_rates))

    @property
    def parts(self) -> dict[str, list[Timing]]:
        m = self.measured
        return {
            "image": m.image,
            "question": m.question,
            "prefill": m.prefill,
            "decode": m.decode,
            "streams": m.streams,
        }


@click.command(short_help="Measure image encoding, prefill and decoding.")
@click.option(
    "-m",
    "--model",
    "models",
    type=model_file,
    multiple=True,
    required=True,
    metavar="M.gguf",
    help="May be repeated; demo: the packaged model.",
)
@click.option("--mmproj", metavar="FILE", help="The vision tower, where the models' files do not hold it.")
@click.option("--image", metavar="FILE", help="A picture.  [default: a drawn one]")
@click.option(
    "--image-size",
    callback=_sizes,
    metavar="WxH,...",
    default="1024x683",
    show_default=True,
    help="Of drawn ones.",
)
@click.option("--prompt-tokens", callback=_numbers(2), metavar="N,...", default="512", show_default=True)
@click.option(
    "--depth",
    callback=_numbers(0),
    metavar="N,...",
    default="0",
    show_default=True,
    help="Tokens of context that decoding starts from.",
)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--streams", callback=_numbers(1), metavar="N,...", help="Decode that many sequences together too."
)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--precision", type=click.Choice(["fast", "exact"]), default="fast", show_default=True)
@device_option
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["image", "question", "prefill", "decode", "streams"]),
    help="Leave the rest out; may be repeated.",
)
@click.option("--profile", is_flag=True, help="The stages of each forward pass too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of Markdown tables.")
def bench(models: Sequence[str], as_json: bool, profile: bool, **settings: Any) -> None:
    """Measure image encoding, questions about a photo, prefill and decoding: medians, and the least and most.

    Each figure comes with the fraction of its floor: what the same work takes at the speed of this machine's
    8-bit and floating-point dot products (images, prefill), measured before and after, or of merely reading
    the weights (decode), measured between the runs; sequences decoded together have none.
    Every model runs in a process of its own, so that its peak memory is its own. Machines drift: compare
    models within one run.

    \b
    Examples:
      qwen2vl-q bench -m m.gguf
      qwen2vl-q bench -m q4.gguf -m q8.gguf --prompt-tokens 512,2048 --depth 0,4096
      qwen2vl-q bench -m demo --image-size 336x224
    """
    from qwen2vl_q.benchmark import Settings

    results = []
    for model in models:
        Path(model).stat()
        click.echo(f"measuring {model} ...", err=True)
        results.append(run(Settings(model, **settings)))
    if as_json:
        click.echo(json.dumps([as_dict(result, profile) for result in results], indent=2))
        return
    click.echo(summary_table(results))
    for result in results:
        click.echo(f"\n{limits_line(result)}")
        if profile:
            click.echo(f"\n{profile_table(result)}")


def run(settings: Settings) -> Result:
    """Measures a model in a process of its own, and the machine's ceilings before and after.

    Raises what loading and running the model raise; Qwen2VLError where the process dies.
    """
    from qwen2vl_q.benchmark import file_bytes
    from qwen2vl_q.devices import cuda_index

    index = cuda_index(settings.device)
    # "auto" is settled here: the model must not end up on another device than the ceilings are of.
    settings = replace(settings, device="cpu" if index is None else f"cuda:{index}")
    before = _limits(index, settings.threads)
    measured = _in_own_process(settings)
    print_note(measured.note)
    return Result(settings, file_bytes(settings), measured, before, _limits(index, settings.threads))


def _limits(cuda_index: int | None, threads: int | None) -> Limits:
    import os

    from qwen2vl_q.limits import Limits

    if cuda_index is None:
        return Limits.measure(os.environ.get("QWEN2VL_ISA", ""), threads or 0)
    return Limits.measure_device(cuda_index)


def _in_own_process(settings: Settings) -> Measured:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from qwen2vl_q.benchmark import measure
    from qwen2vl_q.errors import Qwen2VLError

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, settings, time.time()).result()
        except BrokenProcessPool:
            raise Qwen2VLError(f"{settings.model}: the measuring process died (out of memory?)") from None


# --- what is printed ---


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the heading."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary_table(results: Sequence[Result]) -> str:
    """A row for each thing measured: medians, with the least and the most in brackets."""
    rows = [("model", "what", "seconds", "tokens/s", "of the floor")]
    for result in results:
        m = result.measured
        name = f"{Path(result.settings.model).name} ({computing_on(m.isa, m.n_threads)}, {m.precision})"
        rows.append((name, "load", f"{m.load_seconds:.2f}", "", ""))
        rows.append(("", "process start to first token", f"{m.start_seconds:.2f}", "", ""))
        if m.vision_load_seconds is not None:
            rows.append(("", "load of the vision tower", f"{m.vision_load_seconds:.2f}", "", ""))
        for timing in (timing for part in result.parts.values() for timing in part):
            rows.append(("", f"{timing.what} ({timing.count} tokens)", *_figures(result, timing)))
        if m.peak_memory_bytes is not None:
            rows.append(("", "peak memory", f"{m.peak_memory_bytes / 1e9:.2f} GB", "", ""))
    return table(rows)


def _figures(result: Result, timing: Timing) -> tuple[str, str, str]:
    floor = result.floor(timing)
    is_wait = timing in result.measured.question  # for a first token, whatever the number of tokens
    return (
        _spread(timing.seconds, timing.median_seconds, 2 if timing.median_seconds >= 1 else 3),
        "" if is_wait else _spread(timing.rates, timing.count / timing.median_seconds, 1),
        "" if floor is None else _percent(floor, timing.median_seconds),
    )


def _spread(values: Sequence[float], middle: float, digits: int) -> str:
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _percent(floor: float, seconds: float) -> str:
    return f"{100 * floor / seconds:.0f} %"


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
    reads = [rate for timing in m.decode for rate in timing.read_rates]
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
    for timing in (timing for part in result.parts.values() for timing in part):
        in_stages = sum(stage.seconds for stage in timing.stages)
        total = sum(timing.seconds) / len(timing.seconds) if of_timed_runs else in_stages
        limits = result.limits_of(timing)
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
        if timing.read_rates:
            fields["read_bytes_per_s"] = list(timing.read_rates)
        if profile:
            fields["stages"] = [
                {**asdict(stage), "floor_seconds": result.limits_of(timing).stage_floor(stage)}
                for stage in timing.stages
            ]
        return fields

    m = result.measured
    return {
        "model": result.settings.model,
        "device": m.device,
        "isa": m.isa,
        "n_threads": m.n_threads,
        "precision": m.precision,
        "file_bytes": result.file_bytes,
        "load_seconds": m.load_seconds,
        "start_seconds": m.start_seconds,
        "vision_load_seconds": m.vision_load_seconds,
        **{name: [timing_dict(timing) for timing in part] for name, part in result.parts.items()},
        "peak_memory_bytes": m.peak_memory_bytes,
        "limits_before": asdict(result.before),
        "limits_after": asdict(result.after),
    }
