"""Runs the same work in this package, llama.cpp and OpenVINO GenAI, in turns, and prints the ratios.

All get random weights in the 2B shape: one file for us; for llama.cpp a language model and a vision tower
("mmproj"), in F16 as its users have it; for OpenVINO a folder in its own format. Ours and llama.cpp's are
written to --folder once (4 GB). Every measurement runs in a process of its own, one after the other (ours,
theirs, ours, theirs, ...), so that they share neither memory nor cores.

"Streams" are decoded together: ours calls of `generate` on one model, llama.cpp's sequences with a row each
in every batch, as in llama-batched-bench; tokens/s are of all of them. OpenVINO has no part in that.

Either peer is an optional install, best into an environment of its own, and left out where none is named.
llama.cpp is built for this very processor from its source package (half an hour on two cores):

\b
  python3 -m venv peers
  CMAKE_ARGS="-DGGML_NATIVE=ON" peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
  python bench/peers.py --peer-python peers/bin/python

--isa has ours compute with one instruction set, beside a llama.cpp that was built for the same, here AVX2
(with -DGGML_AVX_VNNI=ON besides: avxvnni):

\b
  CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" ...
  python bench/peers.py --peer-python peers-avx2/bin/python --isa avx2

OpenVINO needs a converted checkpoint, a real one or make_openvino_model.py's (optimum-intel 2.2 converts
Qwen2-VL with transformers 4):

\b
  python3 -m venv openvino
  openvino/bin/pip install openvino-genai optimum-intel nncf "transformers<5"
  python bench/make_openvino_model.py --optimum-cli openvino/bin/optimum-cli 2b-int4
  python bench/peers.py --openvino-python openvino/bin/python --openvino-model 2b-int4
"""

from __future__ import annotations

import json
import os
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
from qwen2vl_q._native import default_thread_count, supported_isas
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.convert.recipe import Recipe
from qwen2vl_q.measure.benchmark import STREAM_PROMPT, drawn_picture
from qwen2vl_q.measure.limits import Limits

_HERE = Path(__file__).parent
_DECODED = 32  # tokens
_RATE = "tokens/s"  # of all streams
_STREAMS = (1, 2, 8, 32)
_LONGEST = 1800  # seconds that a measurement may take
_MEMORY_CONTEXT = 4096  # cells, all in use


@dataclass(frozen=True)
class Task:
    name: str
    kind: str  # "image", "question", "prefill", "decode", "streams"
    n: int  # tokens of the prompt
    repeat: int  # runs within a measurement; for decoding, tokens
    n_ctx: int  # of each stream
    streams: int = 1  # sequences that are decoded together

    @property
    def key(self) -> str:
        if self.kind == "streams":
            return f"streams-{self.streams}"
        return f"{self.kind}-{self.n}" if self.n or self.kind == "decode" else self.kind


TASKS = [
    Task("image encode, 1024 x 683", "image", 0, 1, 1024),
    Task("photo question, first token", "question", 0, 1, _MEMORY_CONTEXT),
    Task("prefill 512", "prefill", 512, 2, 1024),
    Task("prefill 2048", "prefill", 2048, 1, 2304),
    Task("decode, empty context", "decode", 0, _DECODED, 512),
    Task("decode at 4096", "decode", 4096, _DECODED, 4352),
    *(
        Task(f"decode at {STREAM_PROMPT}, streams: {n}", "streams", STREAM_PROMPT, _DECODED, 256, n)
        for n in _STREAMS
    ),
]


@dataclass(frozen=True)
class Side:
    """We or a peer: the command that measures, and its files."""

    name: str
    command: tuple[str, ...]
    files: dict[str, Any]
    leaves_out: tuple[str, ...] = ()  # kinds of tasks

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
    """What each side took, turn by turn: seconds of a run, bytes, or tokens/s. Ours come first."""

    name: str
    unit: str
    measured: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, list[float]]:
        """Above 1 where ours is better: what the peers took by ours, our tokens/s by theirs."""
        ours, *_ = self.measured.values()
        return {
            name: [
                own / peer if self.unit == _RATE else peer / own
                for own, peer in zip(ours, values, strict=True)
            ]
            for name, values in list(self.measured.items())[1:]
        }

    def cells(self) -> tuple[str, ...]:
        scale = 1e-9 if self.unit == "GB" else 1
        return (
            f"{self.name}, {self.unit}",
            *(_spread([scale * value for value in values]) for values in self.measured.values()),
            *(_spread(values) for values in self.ratios.values()),
        )


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _properties(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in value]
    if not all(name and setting for name, _, setting in pairs):
        raise click.BadParameter(f"expected NAME=VALUE, found {' '.join(value)}")
    return {name: setting for name, _, setting in pairs}


def our_files(folder: Path, size: str, type: str) -> dict[str, str]:
    """What is there already stays, here and below."""
    path = folder / f"{size}-{type}.gguf"
    if not path.exists():
        RandomModel.of(size, Recipe(type)).write(path)  # type: ignore[arg-type]  # click has checked it
    return {"model": str(path)}


def llama_cpp_files(folder: Path, size: str, type: str) -> dict[str, str]:
    text, vision = folder / f"{size}-{type}-lm.gguf", folder / f"{size}-mmproj-f16.gguf"
    if not text.exists():
        RandomModel.of(size, Recipe(type)).language_model().write(text)  # type: ignore[arg-type]
    if not vision.exists():
        RandomModel.of(size, Recipe("f16")).vision_tower().write(vision, "clip")
    return {"model": str(text), "mmproj": str(vision)}


def compare(task: Task, sides: list[Side], job: dict[str, Any], turns: int, pause: float) -> list[Row]:
    results: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for turn in range(turns):
        for side in sides:
            click.echo(f"{task.name}: {side.name}, turn {turn + 1} of {turns}", err=True)
            time.sleep(pause)
            details = {"task": task.kind, "n": task.n, "repeat": task.repeat, "n_ctx": task.n_ctx}
            result = side.measure({**job, **details, "streams": task.streams, "seed": turn})
            results[side.name].append(result)
    counts = {name: side[0]["count"] for name, side in results.items()}
    if task.kind != "question" and len({*counts.values()}) != 1:
        raise click.ClickException(f"{task.name}: not the same work: {counts} tokens")
    click.echo(f"{task.name}: " + ", ".join(side[0]["version"] for side in results.values()), err=True)
    if task.kind == "streams":
        rates = {name: [r["count"] / median(r["seconds"]) for r in side] for name, side in results.items()}
        return [Row(task.name, _RATE, rates)]
    per_run = 1000 / task.repeat if task.kind == "decode" else 1.0
    seconds = {name: [per_run * median(r["seconds"]) for r in side] for name, side in results.items()}
    rows = [Row(task.name, "ms a token" if task.kind == "decode" else "s", seconds)]
    if task.kind == "question":
        memory = {name: [float(r["peak_memory_bytes"]) for r in side] for name, side in results.items()}
        rows.append(Row(f"peak memory, that photo and {_MEMORY_CONTEXT} tokens", "GB", memory))
    return rows


def _has(python: str, package: str) -> bool:
    return subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode == 0


@click.command(help=__doc__)
@click.option("--peer-python", default=sys.executable, help="The one that has llama-cpp-python.")
@click.option("--openvino-python", help="The one that has openvino-genai.")
@click.option("--openvino-model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--openvino-property",
    "properties",
    multiple=True,
    callback=_properties,
    metavar="NAME=VALUE",
    help="Of its pipeline, such as DYNAMIC_QUANTIZATION_GROUP_SIZE=128.",
)
@click.option("--folder", type=click.Path(path_type=Path), default="peers-models", show_default=True)
@click.option("--size", type=click.Choice(["2b", "7b"]), default="2b", show_default=True)
@click.option("--type", "type_", type=click.Choice(["q4_0", "q8_0"]), default="q4_0", show_default=True)
@click.option("--only", multiple=True, type=click.Choice([task.key for task in TASKS]))
@click.option("--turns", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--isa", type=click.Choice(supported_isas()), envvar="QWEN2VL_ISA", help="Ours computes with it."
)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@click.option("--pause", type=click.FloatRange(min=0), default=0.0, help="Seconds before each measurement.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a Markdown table.")
def main(
    peer_python: str,
    openvino_python: str | None,
    openvino_model: Path | None,
    properties: dict[str, str],
    folder: Path,
    size: str,
    type_: str,
    only: tuple[str, ...],
    turns: int,
    isa: str | None,
    threads: int | None,
    pause: float,
    as_json: bool,
) -> None:
    if (openvino_python is None) != (openvino_model is None):
        raise click.UsageError("--openvino-python and --openvino-model go together")
    if openvino_python and not _has(openvino_python, "openvino_genai"):
        raise click.ClickException(f"{openvino_python} has no openvino_genai; --help says how to install it")
    with_llama_cpp = _has(peer_python, "llama_cpp")
    if not with_llama_cpp and (openvino_python is None or peer_python != sys.executable):
        raise click.ClickException(f"{peer_python} has no llama_cpp; --help says how to install it")
    n_threads = threads or default_thread_count()
    if isa:
        os.environ["QWEN2VL_ISA"] = isa  # the measuring processes have it from here
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "picture.npy", drawn_picture((1024, 683)))
    sides = [Side("ours", (sys.executable, str(_HERE / "peer_ours.py")), our_files(folder, size, type_))]
    if with_llama_cpp:
        command = (peer_python, str(_HERE / "peer_llama_cpp.py"))
        sides.append(Side("llama.cpp", command, llama_cpp_files(folder, size, type_)))
    if openvino_python:
        command = (openvino_python, str(_HERE / "peer_openvino.py"))
        files = {"model": str(openvino_model), "properties": properties}
        sides.append(Side("OpenVINO", command, files, leaves_out=("streams",)))
    job = {"threads": n_threads, "picture": str(folder / "picture.npy")}
    before = Limits.measure(isa or "", n_threads)
    rows = [
        row
        for task in TASKS
        if not only or task.key in only
        for row in compare(task, [s for s in sides if task.kind not in s.leaves_out], job, turns, pause)
    ]
    after = Limits.measure(isa or "", n_threads)
    if as_json:
        measured = [{**asdict(row), "ratios": row.ratios} for row in rows]
        print(json.dumps({"rows": measured, "limits": [asdict(before), asdict(after)]}, indent=2))
        return
    title = f"{type_}, {n_threads} threads, ours on {before.isa}"
    streams = [row for row in rows if row.unit == _RATE]
    for group, ratio in (([row for row in rows if row not in streams], "{} / ours"), (streams, "ours / {}")):
        if group:
            ours, *peers = group[0].measured
            heading = (title, ours, *peers, *map(ratio.format, peers))
            print(table([heading, *(row.cells() for row in group)]), end="\n\n")
    for name, limits in (("before", before), ("after", after)):
        rates = {k: f"{v / 1e9:.0f}" for k, v in asdict(limits).items() if k.endswith("_per_s")}
        print(f"Limits {name}, {limits.isa}, in 10^9: " + ", ".join(f"{k} {v}" for k, v in rates.items()))


if __name__ == "__main__":
    main()
