"""qwen2vl-q bench: how fast a model's file runs on this machine, and how near to what the machine can do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.bench_run import Progress, Runner
from qwen2vl_q.cli.bench_tables import (
    Result,
    as_csv_table,
    as_dict,
    comparison_notes,
    comparison_table,
    limits_line,
    profile_table,
    summary_table,
)
from qwen2vl_q.cli.bench_types import bench_types
from qwen2vl_q.cli.device import device_option, print_note
from qwen2vl_q.cli.errors import complain, describe
from qwen2vl_q.cli.model_file import model_file, model_or_checkpoint
from qwen2vl_q.cli.options import lora_option
from qwen2vl_q.cli.type_tables import Csv, Json, Table

if TYPE_CHECKING:
    from qwen2vl_q.measure.benchmark import Settings


def _numbers(least: int) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """An option's callback: numbers with commas between, "512,2048"."""

    def parse(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
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


def _types(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """An option's callback: names of types with commas between, "q4_0,q8_0"."""
    from qwen2vl_q.measure.model_source import TYPES

    types = tuple(dict.fromkeys(value.lower().split(","))) if value is not None else ()
    for type in types:
        if type not in TYPES:
            raise click.BadParameter(f"expected some of {', '.join(TYPES)}, found {printable(type)}")
    return types


@click.command(short_help="Measure image encoding, prefill and decoding.")
@click.argument("source", metavar="[SOURCE]", required=False, type=model_or_checkpoint)
@click.option(
    "--types",
    callback=_types,
    metavar="TYPE,...",
    help="Make SOURCE's file in each of these types, as convert does, and compare them.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Of --types' files, which stay there and are found again.  [default: a temporary one]",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Plot --types' rows, too (needs matplotlib).",
)
@click.option(
    "-m",
    "--model",
    "models",
    type=model_file,
    multiple=True,
    metavar="M",
    help="A GGUF file, a name of the Hugging Face hub, or demo: the packaged model. May be repeated, for a "
    "table that compares.",
)
@click.option(
    "--mmproj",
    metavar="FILE",
    help="The vision tower, where the models' files do not hold it.  [default: the one beside each]",
)
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
    "--streams",
    callback=_numbers(1),
    metavar="N,...",
    default="1,2,8,32",
    show_default=True,
    help="Numbers of calls that decode together.",
)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--precision", type=click.Choice(["fast", "exact"]), default="fast", show_default=True)
@device_option
@lora_option("to compute beside the weights")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["image", "question", "prefill", "decode", "sampled", "streams"]),
    help="Leave the rest out; may be repeated.",
)
@click.option("--profile", is_flag=True, help="The stages of each forward pass too (tables, JSON).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a list with an object for each model.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, a row for each figure of each model.")
def bench(
    source: str | None,
    types: Sequence[str],
    folder: Path | None,
    plot: Path | None,
    models: Sequence[str],
    as_json: bool,
    as_csv: bool,
    profile: bool,
    **settings: Any,
) -> None:
    """Measure image encoding, questions about a photo, prefill and decoding: medians, and the least and most.

    Of several models, one table compares them: type, size, bits a weight, medians, memory. Decoding is
    greedy, and once more "sampled", at temperature 1 and top_p 0.9. "Streams" are calls of generate under
    way at once, after prompts of 32 tokens: the tokens of all, and how many times as fast as one alone.

    Each figure comes with the fraction of its floor: what the same work takes at the speed of this machine's
    8-bit and floating-point dot products (images, prefill), measured before and after, or of merely reading
    the weights (decode), measured between the runs; streams have none.
    Every model runs in a process of its own, so that its peak memory is its own. A model that cannot be
    measured is named on stderr, the others are measured all the same; the exit code is then 1. Machines
    drift: compare models within one run.

    --types compares a model with itself: of SOURCE, a checkpoint's folder or a GGUF file, it makes a file of
    each type and prints a row as soon as it is measured, images, prefill and decoding where --only does not
    say others, and how far its next tokens are from SOURCE's in exact precision (see verify).

    \b
    Examples:
      qwen2vl-q bench -m m.gguf
      qwen2vl-q bench -m q4.gguf -m q8.gguf -m f16.gguf           # one table
      qwen2vl-q bench -m q4.gguf -m q8.gguf --prompt-tokens 512,2048 --depth 0,4096
      qwen2vl-q bench -m m.gguf --only decode --only streams --streams 1,4,16
      qwen2vl-q bench -m q4.gguf -m q8.gguf --csv > figures.csv   # or --json
      qwen2vl-q bench -m Qwen/Qwen2-VL-2B-Instruct -m Qwen/Qwen2-VL-2B-Instruct:q8_0
      qwen2vl-q bench -m demo --image-size 336x224
      qwen2vl-q bench --types q4_0,q8_0,f16 ./Qwen2-VL-2B-Instruct --plot types.svg
    """
    from qwen2vl_q.measure.benchmark import Settings

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if types:
        if source is None or models:
            raise click.UsageError("--types measures files that it makes: give SOURCE instead of -m")
        if settings["lora"]:
            raise click.UsageError("--lora does not go with --types: merge it first (convert --lora)")
        printer = partial(Json, profile=profile) if as_json else Csv if as_csv else Table
        if bench_types(source, types, Settings(source, **settings), folder, plot, printer) < len(types):
            raise click.exceptions.Exit(1)
        return
    if source is not None or folder is not None or plot is not None:
        raise click.UsageError("SOURCE, --folder and --plot belong to --types; -m names a file to measure")
    if not models:
        raise click.MissingParameter(param_hint="'-m' / '--model'", param_type="option")
    results = measure_all(models, Settings(models[0], **settings))
    if as_json:
        click.echo(json.dumps([as_dict(result, profile) for result in results], indent=2))
    elif as_csv:
        click.echo(as_csv_table(results), nl=False)
    elif results:
        _print_tables(results, profile, comparing=len(models) > 1)
    if len(results) < len(models):
        raise click.exceptions.Exit(1)


def measure_all(models: Sequence[str], settings: Settings) -> list[Result]:
    """Of those that can be measured. A single model's error is raised, those of several are printed."""
    runner = Runner(settings)
    results = []
    with Progress(len(models)) as progress:
        for model in models:
            progress.begin(model)
            try:
                result = runner.run(model, progress.tell)
            except Exception as error:
                # A broken pipe is stderr's.
                if len(models) == 1 or isinstance(error, BrokenPipeError):
                    raise
                progress.clear()
                complain(describe(error))
                continue
            results.append(result)
            if note := result.measured.note:
                progress.clear()
                print_note(note if len(models) == 1 else f"{printable(Path(model).name)}: {note}")
    return results


def _print_tables(results: Sequence[Result], profile: bool, comparing: bool) -> None:
    if comparing:
        click.echo(f"{comparison_table(results)}\n\n{comparison_notes(results)}")
    else:
        click.echo(f"{summary_table(results)}\n\n{limits_line(results[0])}")
    for result in results if profile else ():
        heading = f"{printable(Path(result.settings.model).name)}\n\n" if comparing else ""
        click.echo(f"\n{heading}{profile_table(result)}")
