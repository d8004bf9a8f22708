"""qwen2vl-q bench: how fast a model's file runs on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from qwen2vl_q.model import Qwen2VL
    from qwen2vl_q.stats import GenerationStats

_SEED = 0
_PICTURE_SIZE = (683, 1024)  # a photo that gives 888 visual tokens


@dataclass(frozen=True)
class Spread:
    """Seconds of the repeats, and the tokens that each of them went through."""

    seconds: tuple[float, ...]
    count: int

    @property
    def rates(self) -> list[float]:
        return [self.count / seconds for seconds in self.seconds]


@dataclass(frozen=True)
class Settings:
    model: str
    mmproj: str | None
    image: str | None
    prompt_tokens: int
    decode_tokens: int
    repeat: int
    threads: int | None
    precision: Literal["fast", "exact"]


@dataclass(frozen=True)
class Result:
    model: str
    isa: str
    n_threads: int
    precision: str
    file_bytes: int
    load_seconds: float
    image: Spread | None  # None for a file without a vision tower
    prefill: Spread
    decode: Spread  # from an empty context
    peak_memory_bytes: int | None


@click.command(short_help="Measure image encoding, prefill and decoding.")
@click.option(
    "-m", "--model", "models", multiple=True, required=True, metavar="M.gguf", help="May be repeated."
)
@click.option("--mmproj", metavar="FILE", help="The vision tower, where the models' files do not hold it.")
@click.option("--image", metavar="FILE", help="A picture.  [default: a drawn one of 1024 x 683]")
@click.option("--prompt-tokens", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--precision", type=click.Choice(["fast", "exact"]), default="fast", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a Markdown table.")
def bench(models: Sequence[str], as_json: bool, **settings: Any) -> None:
    """Measure image encoding, prefill and decoding: medians, and from the least to the most.

    Every model runs in a process of its own, so that its peak memory is its own. Machines drift: compare
    models within one run.
    """
    results = []
    for model in models:
        Path(model).stat()
        click.echo(f"measuring {model} ...", err=True)
        results.append(_in_own_process(Settings(model, **settings)))
    if as_json:
        click.echo(json.dumps([_as_json(result) for result in results], indent=2))
    else:
        click.echo(markdown_table(results))


def _in_own_process(settings: Settings) -> Result:
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    from qwen2vl_q.errors import Qwen2VLError

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, settings).result()
        except BrokenProcessPool:
            raise Qwen2VLError(f"{settings.model}: the measuring process died (out of memory?)") from None


def measure(settings: Settings) -> Result:
    """Loads the model and takes every time `settings.repeat` times."""
    import numpy as np

    from qwen2vl_q.model import Qwen2VL
    from qwen2vl_q.stats import peak_memory_bytes

    started = perf_counter()
    model = Qwen2VL.from_gguf(
        settings.model, settings.threads, precision=settings.precision, mmproj=settings.mmproj
    )
    load_seconds = perf_counter() - started
    rng = np.random.default_rng(_SEED)
    special = list(model.tokenizer.special_tokens.values())
    prompt = np.setdiff1d(rng.permutation(len(model.tokenizer)), special)
    prompt = rng.choice(prompt, settings.prompt_tokens)
    return Result(
        model=settings.model,
        isa=model.isa,
        n_threads=model.n_threads,
        precision=model.precision,
        file_bytes=Path(settings.model).stat().st_size,
        load_seconds=load_seconds,
        image=None if model.config.vision_config is None else _time_image(model, settings),
        prefill=_times(settings, len(prompt), lambda: _generate(model, prompt, 1).prefill_seconds),
        decode=_times(
            settings,
            settings.decode_tokens,
            lambda: _generate(model, prompt[:1], settings.decode_tokens + 1).decode_seconds,
        ),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _times(settings: Settings, count: int, seconds: Callable[[], float]) -> Spread:
    return Spread(tuple(seconds() for _ in range(settings.repeat)), count)


def _generate(model: Qwen2VL, prompt: NDArray[np.integer[Any]], n_tokens: int) -> GenerationStats:
    """What `n_tokens` after `prompt` took, from an empty cache."""
    model.reset()
    generated = list(model.generate(prompt, max_new_tokens=n_tokens, ignore_eos=True))
    stats = model.last_stats
    if len(generated) != n_tokens or stats.reused_tokens:
        raise RuntimeError(
            f"{len(generated)} tokens of {n_tokens}, {stats.reused_tokens} of the prompt reused"
        )
    return stats


def _time_image(model: Qwen2VL, settings: Settings) -> Spread:
    """Of the vision tower alone: the picture has been read and resized before."""
    import numpy as np

    image = model.load_image(_drawn_picture() if settings.image is None else settings.image)

    def seconds() -> float:
        model.reset()
        started = perf_counter()
        embeddings = model.encode_image(image)
        taken = perf_counter() - started
        if not np.isfinite(embeddings).all():
            raise ValueError(f"{settings.model}: the embeddings are not finite: the weights are damaged")
        return taken

    t, rows, columns = image.grid_thw
    return _times(settings, t * rows * columns // model.image_processor.merge_size**2, seconds)


def _drawn_picture() -> NDArray[np.uint8]:
    """Soft colours, edges and grain, as a photo has them: uint8 [683, 1024, 3]."""
    import numpy as np

    height, width = _PICTURE_SIZE
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    sky = np.stack([90 + y / 8, 120 + x / 16, 200 - y / 6], axis=-1)
    disc = (x - 700) ** 2 + (y - 250) ** 2 < 160**2
    stripes = (np.sin(x / 9 + y / 23) > 0.6) & (y > 400)
    sky[disc] = (230, 180, 60)
    sky[stripes] *= 0.5
    grain = np.random.default_rng(_SEED).normal(0, 6, sky.shape)
    return np.clip(sky + grain, 0, 255).astype(np.uint8)


def markdown_table(results: Sequence[Result]) -> str:
    """Medians, with the least and the most in brackets."""
    rows = [
        ("model", "load", "image", "prefill", "decode", "peak memory"),
        ("---",) * 6,
        *(
            (
                f"{Path(result.model).name} ({result.isa}, {result.n_threads} threads, {result.precision})",
                f"{result.load_seconds:.2f} s",
                _seconds(result.image),
                _rate(result.prefill),
                _rate(result.decode),
                "" if result.peak_memory_bytes is None else f"{result.peak_memory_bytes / 1e9:.2f} GB",
            )
            for result in results
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "no vision tower"
    least, most = min(spread.seconds), max(spread.seconds)
    return f"{spread.count} tokens in {median(spread.seconds):.2f} s ({least:.2f} to {most:.2f})"


def _rate(spread: Spread) -> str:
    least, most = min(spread.rates), max(spread.rates)
    return f"{spread.count} tokens, {median(spread.rates):.1f} tok/s ({least:.1f} to {most:.1f})"


def _as_json(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    for name in ("image", "prefill", "decode"):
        spread = getattr(result, name)
        if spread is not None:
            fields[name]["median_seconds"] = median(spread.seconds)
            fields[name]["median_tokens_per_second"] = median(spread.rates)
    return fields
