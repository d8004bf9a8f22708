"""What the benchmarks of `pytest bench` share: options, the models that they run on, limits, records.

Each has a model and a weight type in its name; bench/README.md says what is recorded with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import qwen2vl_q.convert
from make_model import SHAPES, RandomModel
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.convert import Recipe, convert_checkpoint
from qwen2vl_q.convert.recipe import FILE_TYPES, FileType
from qwen2vl_q.measure.benchmark import Benchmark, Settings, Task, Timing
from qwen2vl_q.measure.limits import Limits

_HERE = Path(__file__).parent
_PACKAGED = "q8_0"  # the type of the packaged demo model
_SIZES = ", ".join(SHAPES)
_DECODED = 64  # tokens
RECORDED = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()
LIMITS = pytest.StashKey[Limits]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("qwen2vl-q")
    group.addoption(
        "--model",
        default="demo",
        metavar="NAME",
        help=f"demo, a shape ({_SIZES}: random weights, made once and kept in pytest's cache) or =FILE. "
        "Default: demo.",
    )
    group.addoption(
        "--types",
        metavar="TYPE,...",
        help=f"Weight types, of {', '.join(FILE_TYPES)}. Default: {_PACKAGED} for demo, q4_0 for a shape.",
    )
    group.addoption("--threads", type=int, metavar="N", help="Default: the physical cores allowed.")
    group.addoption(
        "--limit-seconds", type=float, default=0.5, metavar="S", help="For each of the machine's limits."
    )


@dataclass(frozen=True)
class Model:
    """One of the models asked for; `type` is None for a file that is there."""

    name: str
    type: FileType | None

    def __str__(self) -> str:
        return f"{self.name}-{self.type}" if self.type else Path(self.name).stem

    def file(self, folder: Path) -> Path:
        """Its GGUF; made in `folder` where it is neither packaged nor left by an earlier run of this code."""
        if self.type is None:
            return Path(self.name)
        if (self.name, self.type) == ("demo", _PACKAGED):
            return DEMO_MODEL
        sources = [_HERE / "make_model.py", *sorted(Path(qwen2vl_q.convert.__file__).parent.glob("*.py"))]
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
        out = folder / f"{self}-{digest}.gguf"
        if not out.exists():
            for outdated in folder.glob(f"{self}-*.gguf"):
                outdated.unlink()
            if self.name == "demo":
                convert_checkpoint(_HERE.parent / "demo" / "checkpoint", out, Recipe(self.type))
            else:
                RandomModel.of(self.name, Recipe(self.type)).write(out)
        return out


def models(config: pytest.Config) -> list[Model]:
    """Those that the options name. UsageError for what is not there."""
    name, types = config.getoption("--model"), config.getoption("--types")
    if name != "demo" and name not in SHAPES:
        if not Path(name).is_file():
            raise pytest.UsageError(f"--model: expected demo, {_SIZES} or a file, found {name!r}")
        if config.rootpath.resolve() != _HERE.resolve():
            raise pytest.UsageError(
                f"--model: write --model={name}: pytest takes FILE alone for tests to run"
            )
        if types is not None:
            raise pytest.UsageError(f"--types: {name} is a file, its types are given")
        return [Model(name, None)]
    wanted = (types or (_PACKAGED if name == "demo" else "q4_0")).split(",")
    if unknown := [type for type in wanted if type not in FILE_TYPES]:
        raise pytest.UsageError(f"--types: expected some of {', '.join(FILE_TYPES)}, found {unknown[0]!r}")
    return [Model(name, cast(FileType, type)) for type in wanted]


def pytest_configure(config: pytest.Config) -> None:
    models(config)  # refuses what is not there before anything runs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", models(metafunc.config), ids=str, indirect=True, scope="session")


def pytest_report_header(config: pytest.Config) -> str:
    names = ", ".join(map(str, models(config)))
    return f"models: {names}; {_isa()}, {_threads(config)} threads"


def _isa() -> str:
    return os.environ.get("QWEN2VL_ISA") or _native.supported_isas()[0]


def _threads(config: pytest.Config) -> int:
    return config.getoption("--threads") or _native.default_thread_count()


# --- what is measured ---


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Iterator[Qwen2VL]:
    """Loaded once for all its benchmarks, which come one after another."""
    file = request.param.file(request.config.cache.mkdir("models"))
    yield Qwen2VL.from_gguf(file, _threads(request.config))


@pytest.fixture(scope="session")
def tasks(model: Qwen2VL) -> Benchmark:
    return Benchmark(model, Settings("the model", decode_tokens=_DECODED))


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> Limits:
    """Taken once, before the first benchmark that needs them."""
    found = Limits.measure(_isa(), _threads(pytestconfig), pytestconfig.getoption("--limit-seconds"))
    pytestconfig.stash[LIMITS] = found
    return found


class StageClock:
    """A timer that goes on only while a stage of a forward pass runs: by what the engine's profile says."""

    __name__ = "stage_clock"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


STAGE_CLOCK = StageClock()


@dataclass(frozen=True)
class Recorder:
    """Runs one benchmark and notes what belongs to its figures."""

    benchmark: BenchmarkFixture
    request: pytest.FixtureRequest

    def task(self, task: Task[Any], stage: str | None = None) -> None:
        """A task of `Benchmark`, whole or (timed by STAGE_CLOCK) one stage of its forward passes."""
        tasks: Benchmark = self.request.getfixturevalue("tasks")
        option = self.request.config.getoption
        # The first run warms up, and says what work it is and how often there is time for it.
        seconds, stages = tasks.profiled(task, task.prepare())
        rounds = max(option("benchmark_min_rounds"), int(float(option("benchmark_max_time")) / seconds))
        read_rates: list[float] = []

        def prepare() -> tuple[tuple[Any], dict[str, Any]]:
            if task.waits_for_reads and self.benchmark.enabled:
                read_rates.extend(tasks.read_rates(option("--limit-seconds") / rounds))
            return (task.prepare(),), {}

        def run_stage(state: Any) -> None:
            _, found = tasks.profiled(task, state)
            STAGE_CLOCK.seconds += next(each.seconds for each in found if each.name == stage)

        pedantic: Callable[..., object] = self.benchmark.pedantic
        pedantic(run_stage if stage else task.run, setup=prepare, rounds=rounds)
        if not self.benchmark.enabled:
            return
        timing = Timing(task.what, task.count, (self.median,), tuple(stages), tuple(read_rates))
        limits: Limits = self.request.getfixturevalue("limits")
        if stage is None:
            floor = timing.floor(limits)
        else:
            floor = timing.limits(limits).stage_floor(next(each for each in stages if each.name == stage))
        self.note(task.count, floor)

    def call(self, function: Callable[..., object], *arguments: object, tokens: int | None = None) -> None:
        self.benchmark(function, *arguments)
        if self.benchmark.enabled:
            self.note(tokens)

    @property
    def median(self) -> float:
        assert self.benchmark.stats is not None  # it is enabled
        median: float = self.benchmark.stats.stats.median
        return median

    def note(self, tokens: int | None, floor: float | None = None) -> None:
        info = {
            "tokens": tokens,
            "tokens_per_second": None if tokens is None else tokens / self.median,
            "floor_seconds": floor,
            "floor_fraction": None if floor is None else floor / self.median,
        }
        self.benchmark.extra_info.update(info)
        recorded = self.request.config.stash.setdefault(RECORDED, [])
        recorded.append((self.request.node.name, {"seconds": self.median, **info}))


@pytest.fixture
def record(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Recorder:
    return Recorder(benchmark, request)


# --- what is printed and saved ---


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [("benchmark", "ms", "tokens/s", "of the floor")]
    for name, info in config.stash.get(RECORDED, []):
        rate, fraction = info["tokens_per_second"], info["floor_fraction"]
        cells = ("" if rate is None else f"{rate:.1f}", "" if fraction is None else f"{100 * fraction:.0f} %")
        rows.append((name, f"{1e3 * info['seconds']:.3f}", *cells))
    if len(rows) > 1:
        terminalreporter.write_line(f"\n{table(rows)}\n")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What decides on speed beside the processor, without its clock of this moment: no two runs share it."""
    machine_info |= {"isa": _isa(), "n_threads": _threads(config)}
    for name in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(name, None)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    if LIMITS in config.stash:
        output_json["limits"] = asdict(config.stash[LIMITS])
