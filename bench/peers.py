"""Runs the same work in this package and in llama.cpp, in turns, and prints the ratios.

Both get the same random weights in the 2B shape: one file for us; for llama.cpp a language model and a
vision tower ("mmproj"), in F16 as its users have it. The files are written to --folder once (4 GB). Every
measurement runs in a process of its own, one after the other (ours, theirs, ours, theirs, ...), so that the
two share neither memory nor cores.

llama.cpp is an optional install, built for this very processor from its source package (half an hour on two
cores), best into an environment of its own:

\b
  python3 -m venv peers
  CMAKE_ARGS="-DGGML_NATIVE=ON" peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
  python bench/peers.py --peer-python peers/bin/python
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np

from make_model import RandomModel
from qwen2vl_q._native import default_thread_count
from qwen2vl_q.benchmark import drawn_picture
from qwen2vl_q.cli.bench import table
from qwen2vl_q.convert.recipe import Recipe
from qwen2vl_q.limits import Limits

_HERE = Path(__file__).parent
_DECODED = 32  # tokens
_LONGEST = 1800  # seconds that a measurement may take
_MEMORY_CONTEXT = 4096  # cells, all in use


@dataclass(frozen=True)
class Task:
    name: str
    kind: str  # "image", "question", "prefill", "decode"
    n: int  # tokens of the prompt
    repeat: int  # runs within a measurement; for decoding, tokens
    n_ctx: int

    @property
    def key(self) -> str:
        return f"{self.kind}-{self.n}" if self.n or self.kind == "decode" else self.kind


TASKS = [
    Task("image encode, 1024 x 683", "image", 0, 1, 512),
    Task("photo question, first token", "question", 0, 1, _MEMORY_CONTEXT),
    Task("prefill 512", "prefill", 512, 2, 1024),
    Task("prefill 2048", "prefill", 2048, 1, 2304),
    Task("decode, empty context", "decode", 0, _DECODED, 512),
    Task("decode at 4096", "decode", 4096, _DECODED, 4352),
]


@dataclass(frozen=True)
class Side:
    """One of the two: the command that measures, and its files."""

    name: str
    command: tuple[str, ...]
    files: dict[str, str]

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            self.command,
            input=json.dumps({**job, **self.files}),
            capture_output=True,
            text=True,
            timeout=_LONGEST,
        )
        if done.returncode != 0:
            raise click.ClickException(f"{self.name}: {done.stderr.strip() or done.returncode}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


@dataclass(frozen=True)
class Row:
    """What both sides took, turn by turn: seconds of a run, or bytes."""

    name: str
    unit: str
    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def cells(self) -> tuple[str, ...]:
        scale, digits = (1e-9, 2) if self.unit == "GB" else (1, 2)
        return (
            f"{self.name}, {self.unit}",
            *(_spread([scale * value for value in side], digits) for side in (self.ours, self.theirs)),
            _spread(self.ratios, 2),
        )


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def write_files(folder: Path, size: str, type: str) -> tuple[dict[str, str], dict[str, str]]:
    """Our file; llama.cpp's two; a picture for both. What is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, text = folder / f"{size}-{type}.gguf", folder / f"{size}-{type}-lm.gguf"
    vision, picture = folder / f"{size}-mmproj-f16.gguf", folder / "picture.npy"
    if not (whole.exists() and text.exists()):
        model = RandomModel.of(size, Recipe(type))  # type: ignore[arg-type]  # click has checked it
        model.write(whole)
        model.language_model().write(text)
    if not vision.exists():
        RandomModel.of(size, Recipe("f16")).vision_tower().write(vision, "clip")
    np.save(picture, drawn_picture((1024, 683)))
    shared = {"picture": str(picture)}
    return {"model": str(whole), **shared}, {"model": str(text), "mmproj": str(vision), **shared}


def compare(task: Task, sides: tuple[Side, Side], job: dict[str, Any], turns: int, pause: float) -> list[Row]:
    results: tuple[list[dict[str, Any]], ...] = ([], [])
    for turn in range(turns):
        for side, collected in zip(sides, results, strict=True):
            click.echo(f"{task.name}: {side.name}, turn {turn + 1} of {turns}", err=True)
            time.sleep(pause)
            details = {"task": task.kind, "n": task.n, "repeat": task.repeat, "n_ctx": task.n_ctx}
            collected.append(side.measure({**job, **details, "seed": turn}))
    ours, theirs = results
    if task.kind != "question" and ours[0]["count"] != theirs[0]["count"]:
        raise click.ClickException(
            f"{task.name}: not the same work: {ours[0]['count']} and {theirs[0]['count']} tokens"
        )
    click.echo(f"{task.name}: {ours[0]['version']} and {theirs[0]['version']}", err=True)
    per_run = 1000 / task.repeat if task.kind == "decode" else 1.0
    seconds = [[per_run * median(r["seconds"]) for r in side] for side in results]
    rows = [Row(task.name, "ms a token" if task.kind == "decode" else "s", *seconds)]
    if task.kind == "question":
        memory = [[float(r["peak_memory_bytes"]) for r in side] for side in results]
        rows.append(Row(f"peak memory, that photo and {_MEMORY_CONTEXT} tokens", "GB", *memory))
    return rows


@click.command(help=__doc__)
@click.option("--peer-python", default=sys.executable, help="The one that has llama-cpp-python.")
@click.option("--folder", type=click.Path(path_type=Path), default="peers-models", show_default=True)
@click.option("--size", type=click.Choice(["2b", "7b"]), default="2b", show_default=True)
@click.option("--type", "type_", type=click.Choice(["q4_0", "q8_0"]), default="q4_0", show_default=True)
@click.option("--only", multiple=True, type=click.Choice([task.key for task in TASKS]))
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--pause", type=click.FloatRange(min=0), default=0.0, help="Seconds before each measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a Markdown table.")
def main(
    peer_python: str,
    folder: Path,
    size: str,
    type_: str,
    only: tuple[str, ...],
    turns: int,
    threads: int | None,
    pause: float,
    as_json: bool,
) -> None:
    if subprocess.run([peer_python, "-c", "import llama_cpp"], capture_output=True).returncode != 0:
        raise click.ClickException(f"{peer_python} has no llama_cpp; --help says how to install it")
    n_threads = threads or default_thread_count()
    our_files, their_files = write_files(folder.resolve(), size, type_)
    sides = (
        Side("ours", (sys.executable, str(_HERE / "peer_ours.py")), our_files),
        Side("llama.cpp", (peer_python, str(_HERE / "peer_llama_cpp.py")), their_files),
    )
    before = Limits.measure(n_threads=n_threads)
    rows = [
        row
        for task in TASKS
        if not only or task.key in only
        for row in compare(task, sides, {"threads": n_threads}, turns, pause)
    ]
    after = Limits.measure(n_threads=n_threads)
    if as_json:
        measured = [{**asdict(row), "ratios": row.ratios} for row in rows]
        print(json.dumps({"rows": measured, "limits": [asdict(before), asdict(after)]}, indent=2))
        return
    heading = (f"{type_}, {n_threads} threads", "ours", "llama.cpp", "llama.cpp / ours")
    print(table([heading, *(row.cells() for row in rows)]))
    for name, limits in (("before", before), ("after", after)):
        rates = {k: f"{v / 1e9:.0f}" for k, v in asdict(limits).items() if k.endswith("_per_s")}
        print(f"\nLimits {name}, {limits.isa}, in 10^9: " + ", ".join(f"{k} {v}" for k, v in rates.items()))


if __name__ == "__main__":
    main()
