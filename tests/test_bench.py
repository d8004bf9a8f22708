"""The machine's limits, the floors that follow from them, and the command that prints both."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGUFWriter

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import UnsupportedError
from qwen2vl_q.cli import bench_run
from qwen2vl_q.cli.main import main
from qwen2vl_q.engine.stats import GenerationStats, Stage
from qwen2vl_q.measure.benchmark import Benchmark, Settings, Task, drawn_picture
from qwen2vl_q.measure.limits import Limits
from tables import cells

ROOT = Path(__file__).resolve().parent.parent
QUICK = 0.005  # seconds a loop: enough to run it, not to measure
RATES = ("int8_ops_per_s", "float_ops_per_s", "fp32_ops_per_s", "read_bytes_per_s")


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_limits_of_every_instruction_set(isa: str) -> None:
    rates = _native.measure_limits(isa, 1, QUICK)
    assert tuple(rates) == RATES
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    if isa != "avx512_bf16":
        assert rates["float_ops_per_s"] == rates["fp32_ops_per_s"]


def test_limits_of_several_threads() -> None:
    limits = Limits.measure("generic", 2, QUICK)
    assert (limits.isa, limits.n_threads) == ("generic", 2)
    assert all(getattr(limits, name) > 0 for name in RATES)
    assert Limits.measure(seconds=QUICK).isa == _native.supported_isas()[0]


@pytest.mark.parametrize(
    "argument",
    [
        {"n_threads": -1},
        {"n_threads": 1025},
        *({"seconds": x} for x in (0.0, -1.0, 61.0, math.nan, math.inf)),
    ],
)
def test_limits_refuse_arguments_out_of_range(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(argument))}: expected .*, found "):
        _native.measure_limits(**argument)


def test_limits_refuse_an_unknown_instruction_set() -> None:
    with pytest.raises(UnsupportedError, match='instruction set "abacus"'):
        _native.measure_limits("abacus")


def test_peak_memory_is_the_process_own() -> None:
    ballast = np.ones(50_000_000)  # 400 MB here, none of them in the process that is asked
    code = "from qwen2vl_q.engine.stats import peak_memory_bytes; print(peak_memory_bytes())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert 1_000_000 < peak < ballast.nbytes


# --- the command ---


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_bench(run: Run, tiny_gguf: Path) -> None:
    options = ["--image-size", "84x56", "--prompt-tokens", "20,8", "--depth", "0,30", "--decode-tokens", 5]
    options += ["--repeat", 2, "-t", 1, "--streams", "1,3"]
    code, out, err = run("bench", "-m", tiny_gguf, "-m", tiny_gguf, *options, "--profile", "--json")
    assert code == 0, err
    phases: tuple[str, ...] = (
        "what the machine can do",
        "loading",
        "image 84 x 56",
        "questions",
        "prefill 20",
        "prefill 8",
    )
    phases += (
        "decode at 0",
        "decode at 30",
        "decode at 0, sampled",
        "1 stream, decode at 32",
        "3 streams, decode at 32",
    )
    expected = [f"measuring tiny.gguf ({i} of 2): {p}" for i in (1, 2) for p in (*phases[1:], phases[0])]
    assert err.splitlines() == ["measuring tiny.gguf (1 of 2): what the machine can do", *expected]
    first, second = json.loads(out)
    assert first["model"] == second["model"] == str(tiny_gguf)
    assert set(first) == {
        *("model", "type", "file_bytes", "bits_per_weight", "device", "isa", "n_threads", "precision"),
        *("load_seconds", "start_seconds", "vision_load_seconds", "lora"),
        *("image", "question", "prefill", "decode", "sampled", "streams"),
        *("peak_memory_bytes", "limits_before", "limits_after"),
    }
    assert first["type"] == "F32" and 30 < first["bits_per_weight"] <= 32
    assert first["limits_after"] == second["limits_before"]
    assert [t["what"] for t in first["image"]] == ["image 84 x 56"]
    assert [(t["what"], t["count"]) for t in first["prefill"]] == [("prefill 20", 20), ("prefill 8", 8)]
    assert [(t["what"], t["count"]) for t in first["decode"]] == [("decode at 0", 5), ("decode at 30", 5)]
    assert [(t["what"], t["count"], t["floor_seconds"]) for t in first["streams"]] == [
        ("1 stream, decode at 32", 5, None),
        ("3 streams, decode at 32", 15, None),
    ]
    one, three = first["streams"]
    assert one["times_one_stream"] == 1
    assert three["times_one_stream"] == three["median_tokens_per_second"] / one["median_tokens_per_second"]
    assert len(first["question"]) == 3 and first["start_seconds"] > first["load_seconds"] > 0
    assert first["vision_load_seconds"] >= 0
    assert [(t["what"], t["count"]) for t in first["sampled"]] == [("decode at 0, sampled", 5)]
    parts = ("image", "question", "prefill", "decode", "sampled", "streams")
    for timing in (t for part in parts for t in first[part]):
        assert len(timing["seconds"]) == 2 and min(timing["seconds"]) > 0
        assert timing["median_tokens_per_second"] > 0
    for timing in (t for part in parts if part != "question" for t in first[part]):
        prefix = "image" if timing["what"].startswith("image") else "text"
        assert timing["stages"] and all(stage["name"].startswith(prefix) for stage in timing["stages"])
    for timing in (t for part in ("image", "prefill", "decode", "sampled") for t in first[part]):
        assert timing["floor_seconds"] > 0
        assert timing["floor_fraction"] == timing["floor_seconds"] / timing["median_seconds"]
    for timing in first["decode"] + first["sampled"]:
        assert len(timing["read_bytes_per_s"]) == 3 and min(timing["read_bytes_per_s"]) > 0


def test_reading_the_weights_reads_what_a_token_reads(tiny_gguf: Path) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf)
    # All of it, but for what is left of a matrix behind whole pages.
    assert 0 < model.read_weights() <= model._native.weight_bytes


class OnADevice:
    """A model that says so, and notes at the end of each run whether it was profiled."""

    def __init__(self, model: Qwen2VL) -> None:
        self._model = model
        self._profiled = False
        self.runs: list[tuple[str, bool]] = []
        self.device = "NVIDIA Something"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @contextmanager
    def profile(self) -> Iterator[list[Stage]]:
        self._profiled = True
        with self._model.profile() as stages:
            yield stages
        self._profiled = False

    @property
    def last_stats(self) -> GenerationStats:
        self.runs.append(("text", self._profiled))
        return self._model.last_stats

    def encode_image(self, image: Any) -> Any:
        self.runs.append(("image", self._profiled))
        return self._model.encode_image(image)


def test_a_device_is_not_profiled_while_it_is_timed(tiny_gguf: Path) -> None:
    model = OnADevice(Qwen2VL.from_gguf(tiny_gguf, 1))
    settings = Settings("tiny", image_size=((56, 56),), decode_tokens=2, repeat=2)
    bench = Benchmark(cast(Qwen2VL, model), settings)
    tasks: tuple[Task[Any], ...] = (
        bench.prefill(8),
        bench.decode(0),
        bench.streams(2),
        *bench.tasks("image"),
    )
    for timing in [bench.timing(task) for task in tasks]:
        assert len(timing.seconds) == 2 and timing.stages
    once = [("text", False), ("text", False), ("text", True)]
    assert model.runs == [*once, *once, *(("image", profiled) for _, profiled in once)]


def test_bench_prints_a_part(run: Run, tiny_gguf: Path) -> None:
    code, out, _ = run("bench", "-m", tiny_gguf, "--only", "decode", "--repeat", 1, "-t", 1)
    assert code == 0
    assert [row[1] for row in cells(out)] == [
        *("what", "load", "process start to first token", "decode at 0 (64 tokens)", "peak memory")
    ]
    assert "Limits of " in out


QUICK_RUN = ("--only", "prefill", "--prompt-tokens", 4, "--repeat", 1, "-t", 1)


def test_bench_measures_what_it_can_and_names_the_rest(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "vocabulary.gguf"
    text.write_text("no model")
    writer = GGUFWriter(other, "gpt2")  # opens, but does not run
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    files = [option for file in (text, tiny_gguf, other) for option in ("-m", file)]
    code, out, err = run("bench", *files, *QUICK_RUN)
    assert code == 1
    assert [row[0] for row in cells(out)] == ["file", "tiny.gguf"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    named = zip((text, other), errors, strict=True)
    assert all(str(file) in error for file, error in named), errors
    code, out, err = run("bench", "-m", text, "-m", other, *QUICK_RUN, "--json")
    assert (code, json.loads(out), err.count("error: ")) == (1, [], 2)
    assert run("bench", "-m", tiny_gguf, "--json", "--csv")[0] == 2


def test_bench_prints_csv(run: Run, tiny_gguf: Path) -> None:
    code, out, _ = run("bench", "-m", tiny_gguf, *QUICK_RUN, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and [row["what"] for row in rows] == ["load", "start", "prefill 4"]
    assert all(row["type"] == "F32" and float(row["median_seconds"]) > 0 for row in rows)
    assert int(rows[0]["peak_memory_bytes"]) > 1_000_000


def die(settings: Settings, requested_at: float, to: Connection) -> None:
    os._exit(9)


def test_a_dead_measuring_process_is_an_error(
    run: Run, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "_measure_and_send", die)
    code, out, err = run("bench", "-m", tiny_gguf, *QUICK_RUN)
    assert (code, out) == (1, "") and "error: " in err and "the measuring process died" in err


def tell_of_ctrl_c(settings: Settings, requested_at: float, to: Connection) -> None:
    to.send(ValueError(f"Ctrl-C: {signal.getsignal(signal.SIGINT)!r}"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are not inherited")
def test_the_measuring_process_never_sees_ctrl_c(
    run: Run, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_run, "_measure_and_send", tell_of_ctrl_c)
    assert "SIG_IGN" in run("bench", "-m", tiny_gguf, *QUICK_RUN)[2]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals to groups of processes")
def test_ctrl_c_ends_both_processes_without_a_word(tiny_gguf: Path) -> None:
    options = ["--only", "prefill", "--repeat", "1000000"]
    command = [sys.executable, "-m", "qwen2vl_q.cli.main", "bench", "-m", str(tiny_gguf), *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        while b"prefill" not in (line := process.stderr.readline()):
            assert line
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=10)  # ends where the measuring process has closed its stderr
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err) == (130, b"", b"")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--prompt-tokens", "5,x"), ("--prompt-tokens", "1"), ("--image-size", "10x"), ("--depth", "1,-1")],
)
def test_bench_refuses_lists_that_it_cannot_read(run: Run, tiny_gguf: Path, option: str, value: str) -> None:
    code, _, err = run("bench", "-m", tiny_gguf, option, value)
    assert code != 0 and "expected" in err


def test_profile_of_a_model(tiny: Qwen2VL) -> None:
    with tiny.profile() as stages:
        tiny.encode_image(drawn_picture((84, 56)))
    assert {"image qkv", "image attention", "image merger"} <= {stage.name for stage in stages}
    assert all(stage.calls > 0 and stage.seconds >= 0 for stage in stages)
    before = list(stages)
    list(tiny.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True))
    assert stages == before


# --- the scripts ---


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")
class TestSuite:
    """`pytest bench`, as its users start it."""

    @staticmethod
    def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "bench", "-q", "-o", f"cache_dir={folder / 'cache'}"]
        options = (f"--benchmark-storage={folder / 'runs'}", "--limit-seconds", QUICK, *options)
        outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [*command, *map(str, options)], cwd=ROOT, capture_output=True, text=True, env=outside
        )

    def test_every_benchmark_runs(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "--benchmark-disable")
        assert done.returncode == 0, done.stdout
        assert (found := re.search(r"(\d+) passed", done.stdout)) and int(found.group(1)) > 40
        assert "skipped" not in done.stdout

    def test_records_and_comparison(self, tmp_path: Path) -> None:
        quick = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "--types", "q8_0,q4_0")
        chosen = ("-k", "prefill and 64 or o_proj or tokenize or greedy", "--benchmark-save", "first")
        report = tmp_path / "report.json"
        done = self.run(tmp_path, *quick, *chosen, f"--benchmark-json={report}")
        assert done.returncode == 0, done.stdout
        written = json.loads(report.read_text())
        assert written["machine_info"]["isa"] and written["machine_info"]["n_threads"] >= 1
        assert "hz_actual" not in written["machine_info"]["cpu"]
        assert set(RATES) < set(written["limits"])
        records = {each["name"]: each["extra_info"] for each in written["benchmarks"]}
        names: tuple[str, ...] = (
            "test_prefill[{}-64]",
            "test_text_512_rows[{}-o_proj]",
            "test_text_one_row[{}-o_proj]",
        )
        names += ("test_tokenize[{}]", "test_detokenize[{}]", "test_sampler[{}-greedy]")
        types = ("demo-q8_0", "demo-q4_0")
        assert set(records) == {name.format(type) for name in names for type in types}
        for name, info in records.items():
            assert info["tokens"] >= 1 and info["tokens_per_second"] > 0
            has_floor = "prefill" in name or "o_proj" in name
            assert (info["floor_fraction"] is not None and info["floor_fraction"] > 0) == has_floor
            assert re.search(rf"{re.escape(name)} +\| [\d.]+ ", done.stdout)
        again = self.run(tmp_path, *quick, "-k", "test_prefill and 64", "--benchmark-compare")
        assert again.returncode == 0 and "machine_info is different" not in again.stdout + again.stderr
        assert re.search(r"test_prefill\[demo-q4_0-64\] \(0001_first\)", again.stdout)
        assert re.search(r"test_prefill\[demo-q4_0-64\] \(NOW\)", again.stdout)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--types", "q3"], "--types: expected some of q4_0, .*, found 'q3'"),
            (["--model", "9b"], "--model: expected demo, .*, found '9b'"),
            (["--model", "tests/conftest.py"], "--model: write --model=tests/conftest.py"),
            (["--model=tests/conftest.py", "--types", "f16"], "--types: tests/conftest.py is a file"),
        ],
    )
    def test_wrong_options(self, tmp_path: Path, options: list[str], message: str) -> None:
        done = self.run(tmp_path, *options)
        assert done.returncode == 4 and re.search(f"ERROR: {message}", done.stderr + done.stdout)


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")
def test_what_guesses_save() -> None:
    command = [sys.executable, "bench/guesses.py", "--depth", "64", "--repeat", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    costs, saved = (part.splitlines() for part in done.stdout.split("\n\n")[1:])
    assert [line.split()[1] for line in costs[2:]] == ["1", "2", "3", "4", "5", "6", "8", "12", "16"]
    right = re.findall(r"\| (\d+) of (\d+) ", "\n".join(saved))
    assert len(right) == 3 and right[1] == ("49", "56") and right[2] == ("0", "0")


@pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree")
def test_halves_of_a_random_model_are_named_as_llama_cpp_does() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    from make_model import RandomModel
    from qwen2vl_q.convert import Recipe

    golden = json.loads((ROOT / "tests" / "data" / "llama_cpp_names.json").read_text())
    model = RandomModel.of("2b", Recipe("q4_0"))
    for half, name in ((model.language_model(), "language"), (model.vision_tower(), "vision")):
        tensors = {re.sub(r"\d+", "N", tensor) for tensor in golden[name]["tensors"]}
        assert {re.sub(r"\d+", "N", tensor) for tensor in half.tensors} == tensors
        # The writer itself adds the architecture; random weights have no labels and no template; of keys that
        # it does not know llama.cpp says nothing.
        differing = "|".join(
            (
                r"general\.(architecture|sampling\..*|size_label)",
                r"tokenizer\..*(_id|template|add_bos_token)",
                r"clip\.vision\.spatial_merge_size",
            )
        )
        found = {entry.key for entry in half.entries}
        keys = set(golden[name]["keys"])
        assert {k for k in keys ^ found if not re.fullmatch(differing, k)} == set()
    assert len(model.tensors) == len(model.language_model().tensors) + len(model.vision_tower().tensors)
