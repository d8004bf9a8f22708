"""What a machine with a GPU has to say about the CUDA backend, in ten minutes at most.

Builds the plug-in for the machine's own GPU where none is there, runs its tests, measures models of random
weights on it and beside it on the CPU, and runs the demo under compute-sanitizer. Every step is a process of
its own with its output in OUT/NAME.log; one that fails is noted and the rest goes on. OUT/report.md has a
table of the steps and the figures. Exit code 1: a step failed.

\b
  python bench/cuda_report.py report
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from qwen2vl_q.base.errors import DeviceError
from qwen2vl_q.cli.bench_tables import FileSummary, Result, limits_line, profile_table, summary_table, table
from qwen2vl_q.engine.devices import PLUGIN_VARIABLE, cuda_plugin
from qwen2vl_q.engine.stats import Stage
from qwen2vl_q.measure.benchmark import Measured, Settings, Timing
from qwen2vl_q.measure.limits import Limits

_ROOT = Path(__file__).resolve().parent.parent
_LONGEST = 590.0  # seconds, all steps together
_PYTHON = sys.executable
_COMMAND = [_PYTHON, "-c", "import sys; from qwen2vl_q.cli.main import main; sys.exit(main())"]
_SIZES = (
    "--prompt-tokens 512,1024,2048 --depth 0,4096 --image-size 1024x683,2044x2044 --decode-tokens 256 "
    "--streams 1,8,32,64"
)
# With a minimum, scales of 16 values, a table.
_OTHER_TYPES = ("q4_k_m", "q2_k", "iq4_xs")
_OTHER_SIZES = (
    "--prompt-tokens 1024 --decode-tokens 256 --streams 1,64 --only prefill --only decode --only streams"
)
_QUICK_SIZES = "--prompt-tokens 80 --image-size 112x112 --decode-tokens 4 --streams 1,3 --repeat 1"
_CPU_SIZES = "--prompt-tokens 512 --only prefill --only decode --only image --repeat 2"
_SMALL_RUN = """
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo import cards
model = Qwen2VL.from_gguf(DEMO_MODEL, device="cuda")
card, _ = cards.example(0)
model.encode_image(card)
text = "What is on the card?"
message = {"role": "user", "content": [{"type": "image", "image": card}, {"type": "text", "text": text}]}
ids, images = model.encode_chat([message])
print(list(model.generate(ids, images, max_new_tokens=8, ignore_eos=True)))
"""


@dataclass(frozen=True)
class Step:
    name: str
    outcome: str  # "ok", "not there", or how it failed
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.outcome not in ("ok", "not there")


@dataclass
class Report:
    """The steps so far; report.md is written anew after each, so that what is stopped leaves one too."""

    out: Path
    environment: dict[str, str]
    steps: list[Step] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    started: float = field(default_factory=perf_counter)

    def run(self, name: str, command: Sequence[str | Path], limit: float) -> bool:
        """Whether it ended well. A program that is not installed is noted and no failure, but for CMake."""
        arguments = [str(argument) for argument in command]
        if shutil.which(arguments[0], path=self.environment["PATH"]) is None:
            return self.note(Step(name, "failed (no cmake)" if arguments[0] == "cmake" else "not there"))
        started = perf_counter()
        left = min(limit, _LONGEST - (started - self.started))
        if left <= 0:
            return self.note(Step(name, "no time left"))
        click.echo(f"{name} ...", err=True)
        with (self.out / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                arguments,
                cwd=_ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(left)
                outcome = "ok" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                outcome = f"not done after {left:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                    process.wait()
        return self.note(Step(name, outcome, perf_counter() - started))

    def note(self, step: Step) -> bool:
        self.steps.append(step)
        click.echo(f"{step.name}: {step.outcome}, {step.seconds:.0f} s", err=True)
        self.write()
        return step.outcome == "ok"

    def bench(self, name: str, model: str | Path, options: Sequence[str], limit: float) -> None:
        """NAME.json and NAME.md of one run."""
        log = self.out / f"{name}.log"
        if not self.run(name, [*_COMMAND, "bench", "-m", model, "--json", "--profile", *options], limit):
            return
        text = log.read_text(encoding="utf-8")
        printed, _ = json.JSONDecoder().raw_decode(text, text.index("\n[\n") + 1)  # between what stderr says
        (self.out / f"{name}.json").write_text(json.dumps(printed, indent=2), encoding="utf-8")
        result = result_of(printed[0])
        text = f"{summary_table([result])}\n\n{limits_line(result)}\n\n{profile_table(result)}\n"
        (self.out / f"{name}.md").write_text(text, encoding="utf-8")
        self.tables.append(f"## {name}\n\n{text}")
        self.write()

    def write(self) -> None:
        rows = [("step", "outcome", "seconds")]
        rows += [(step.name, step.outcome, f"{step.seconds:.1f}") for step in self.steps]
        parts = [f"# CUDA report\n\n{table(rows)}\n", *self.tables]
        (self.out / "report.md").write_text("\n".join(parts), encoding="utf-8")


def result_of(printed: dict[str, Any]) -> Result:
    """From what `qwen2vl-q bench --json --profile` prints of a model."""

    def stages(timing: dict[str, Any]) -> tuple[Stage, ...]:
        return tuple(
            Stage(**{name: value for name, value in stage.items() if name != "floor_seconds"})
            for stage in timing["stages"]
        )

    def timing(t: dict[str, Any]) -> Timing:
        reads = tuple(t.get("read_bytes_per_s", ()))
        return Timing(t["what"], t["count"], tuple(t["seconds"]), stages(t), reads)

    fields = {name: printed[name] for name in Measured.__dataclass_fields__ if name in printed}
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = [timing(t) for t in value]
    measured = Measured(**fields)
    before, after = (Limits(**printed[name]) for name in ("limits_before", "limits_after"))
    file = FileSummary(printed["type"], printed["file_bytes"], printed["bits_per_weight"])
    return Result(Settings(printed["model"]), file, measured, before, after)


def architecture() -> str | None:
    """What CMake calls the first GPU's own; wgmma is for 9.0's "a" alone."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split()
    number = found[0].replace(".", "") if found else ""
    if not number.isdecimal():
        return None
    return "90a-real" if number == "90" else f"{number}-real"


def build(report: Report) -> None:
    """The plug-in of this tree, which the steps from here on use."""
    own = architecture()
    if own is None:
        report.note(Step("build", "failed (no GPU to build for)"))
        return
    folder = report.out / "build"
    options = ["-DQWEN2VL_CUDA=ON", "-DQWEN2VL_BUILD_PYTHON=OFF", f"-DQWEN2VL_CUDA_ARCHITECTURES={own}"]
    options.append(f"-DPython_EXECUTABLE={_PYTHON}")
    if not report.run("configure", ["cmake", "-S", _ROOT, "-B", folder, *options], 60):
        return
    jobs = str(os.cpu_count() or 1)
    if report.run("build", ["cmake", "--build", folder, "--target", "qwen2vl_cuda", "-j", jobs], 300):
        report.environment[PLUGIN_VARIABLE] = str(folder / "libqwen2vl_cuda.so")


def installed_plugin() -> str | None:
    try:
        return cuda_plugin()
    except DeviceError:  # the variable names what is not there
        return None


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--plugin",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="The plug-in's library.  [default: the installed one, else one built from this tree]",
)
@click.option("--quick", is_flag=True, help="The demo model alone, at small sizes.")
def main(out: Path, plugin: str | None, quick: bool) -> None:
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(_PYTHON).parent), os.environ.get("PATH", os.defpath)])
    report = Report(out, {**os.environ, "PATH": path})
    report.run("nvidia-smi", ["nvidia-smi"], 30)
    report.run("nvcc", ["nvcc", "--version"], 30)
    plugin = plugin or installed_plugin()
    if plugin is None:
        build(report)
    else:
        report.environment[PLUGIN_VARIABLE] = plugin
    report.run("version", [*_COMMAND, "--version"], 30)
    # Without a device the tests are skipped, which is no failure to pytest.
    report.run(
        "device", [_PYTHON, "-c", "from qwen2vl_q.engine import devices as d; print(*d.cuda_devices())"], 30
    )
    report.run("tests", [_PYTHON, "-m", "pytest", "-q", "-rs", "tests/test_cuda.py"], 300 if quick else 150)
    with tempfile.TemporaryDirectory() as folder:
        measure(report, Path(folder), quick)
    report.run(
        "cpu-tests",
        [_PYTHON, "-m", "pytest", "-q", "-x", "tests/test_engine.py", "tests/test_model_api.py"],
        90,
    )
    small = [_PYTHON, "-c", _SMALL_RUN]
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        report.run(tool, ["compute-sanitizer", *options, *small], 90)
    click.echo(out / "report.md")
    sys.exit(any(step.failed for step in report.steps))


def measure(report: Report, folder: Path, quick: bool) -> None:
    """The benchmarks on the device and on the CPU."""
    if quick:
        report.bench("demo", "demo", ["--device", "cuda", *_QUICK_SIZES.split()], 240)
        report.bench("demo-cpu", "demo", _QUICK_SIZES.split(), 60)
        return
    for type_ in ("q4_0", "q8_0", *_OTHER_TYPES):
        model = folder / f"2b-{type_}.gguf"
        maker = _ROOT / "bench" / "make_model.py"
        sizes = _OTHER_SIZES if type_ in _OTHER_TYPES else _SIZES
        if report.run(f"make-{type_}", [_PYTHON, maker, "--type", type_, model], 90):
            report.bench(type_, model, ["--device", "cuda", *sizes.split()], 120)
    if (model := folder / "2b-q4_0.gguf").exists():
        report.bench("q4_0-cpu", model, _CPU_SIZES.split(), 120)


if __name__ == "__main__":
    main()
