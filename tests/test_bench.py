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
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGUFWriter

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.benchmark import Benchmark, Measured, Settings, Task, Timing, drawn_picture
from qwen2vl_q.cli import bench_run
from qwen2vl_q.cli.bench_tables import (
    FileSummary,
    Result,
    as_csv_table,
    as_dict,
    comparison_notes,
    comparison_table,
    limits_line,
    profile_table,
    stage_rate,
    summary_table,
)
from qwen2vl_q.cli.main import main
from qwen2vl_q.errors import UnsupportedError
from qwen2vl_q.limits import Limits, Stage, mean_stages
from qwen2vl_q.stats import GenerationStats

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


# --- floors ---

LIMITS = Limits("x", 2, int8_ops_per_s=1000, float_ops_per_s=400, fp32_ops_per_s=200, read_bytes_per_s=50)
LINEAR = Stage("text down_proj", 2, 3.0, int8_ops=1000, float_ops=0, bytes=100)
ATTENTION = Stage("text attention", 2, 2.0, int8_ops=0, float_ops=800, bytes=10)
NORM = Stage("text norm", 4, 0.5, int8_ops=0, float_ops=0, bytes=0)
STAGES = (LINEAR, ATTENTION, NORM)


def test_floors_of_a_profile() -> None:
    assert LIMITS.image_floor(STAGES) == pytest.approx(1000 / 1000 + 800 / 400)
    assert LIMITS.prefill_floor(STAGES) == pytest.approx(1000 / 1000)
    assert LIMITS.decode_floor(STAGES) == pytest.approx(110 / 50)
    assert [LIMITS.stage_floor(stage) for stage in STAGES] == pytest.approx([100 / 50, 800 / 400, 0])


def test_exact_is_measured_against_float32() -> None:
    assert LIMITS.for_precision("fast") == LIMITS
    assert LIMITS.for_precision("exact").image_floor(STAGES) == pytest.approx(1000 / 1000 + 800 / 200)


def test_better_limits_take_each_rate_from_where_it_is_higher() -> None:
    other = Limits("x", 2, int8_ops_per_s=900, float_ops_per_s=450, fp32_ops_per_s=200, read_bytes_per_s=60)
    assert LIMITS.better(other) == Limits("x", 2, 1000, 450, 200, 60)


def test_mean_stages() -> None:
    second = Stage("text norm", 4, 1.5, 2, 4, 6)
    assert mean_stages([[NORM, LINEAR], [second, LINEAR]]) == (Stage("text norm", 4, 1.0, 1, 2, 3), LINEAR)


def cells(text: str) -> list[list[str]]:
    """The rows of the Markdown table in a text, without the rule below the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if "---" not in line]


def hand_made_result() -> Result:
    measured = Measured(
        "x", 2, "fast", 0.5, 0.75,
        image=[Timing("image 28 x 28", 10, (4.0, 6.0, 5.0), STAGES)],
        prefill=[Timing("prefill 10", 10, (4.0,), STAGES)],
        decode=[Timing("decode at 0", 10, (4.4,), STAGES)],
        question=[Timing("first token, photo", 20, (7.0,))],
        peak_memory_bytes=2_000_000_000,
    )  # fmt: skip
    slower = Limits("x", 2, *([1.0] * 4))
    return Result(Settings("m.gguf"), FileSummary("Q4_0", 1_230_000, 4.5), measured, slower, LIMITS)


def test_fractions_of_the_floor() -> None:
    printed = as_dict(hand_made_result(), profile=True)
    assert printed["image"][0]["floor_fraction"] == pytest.approx(3 / 5)
    assert printed["prefill"][0]["floor_fraction"] == pytest.approx(1 / 4)
    assert printed["decode"][0]["floor_fraction"] == pytest.approx(2.2 / 4.4)
    assert printed["question"][0]["floor_fraction"] is None
    assert [stage["floor_seconds"] for stage in printed["decode"][0]["stages"]] == pytest.approx([2, 2, 0])


def test_decoding_is_measured_against_reads_between_its_runs() -> None:
    result = hand_made_result()
    timing = replace(result.measured.decode[0], read_rates=(10.0, 40.0, 30.0))
    result = replace(result, measured=replace(result.measured, decode=[timing]))
    printed = as_dict(result, profile=True)["decode"][0]
    assert printed["floor_fraction"] == pytest.approx(110 / 30 / 4.4)
    assert [stage["floor_seconds"] for stage in printed["stages"]] == pytest.approx([100 / 30, 2, 0])
    assert printed["read_bytes_per_s"] == [10, 40, 30]
    assert limits_line(result).endswith("between its runs, 0.0 to 0.0 GB/s, their median.")
    assert "plain reads" not in limits_line(hand_made_result())


def test_tables() -> None:
    text = summary_table([hand_made_result()])
    assert len({len(line) for line in text.splitlines()}) == 1  # columns are aligned
    summary = cells(text)
    assert summary[1][0] == "m.gguf (Q4_0; x, 2 threads, fast)"
    assert ["", "image 28 x 28 (10 tokens)", "5.00 (4.00 to 6.00)", "2.0 (1.7 to 2.5)", "60 %"] in summary
    assert ["", "first token, photo (20 tokens)", "7.00 (7.00 to 7.00)", "", ""] in summary
    profile = cells(profile_table(hand_made_result()))
    assert ["decode at 0", "text down_proj", "2", "3000.0", "68.2 %", "0.0 GB/s", "67 %"] in profile
    assert ["decode at 0", "text norm", "4", "500.0", "11.4 %", "", ""] in profile
    assert ["decode at 0", "the rest", "", "-1100.0", "-25.0 %", "", ""] in profile


def test_one_table_compares_files() -> None:
    one = hand_made_result()
    sampled = Timing("decode at 0, sampled", 10, (5.0, 20.0), STAGES)
    settings = replace(one.settings, model="other.gguf", prompt_tokens=(10,), streams=(2,))
    other = replace(
        one,
        settings=settings,
        file=FileSummary("F16", 4_400_000_000, 16.0),
        measured=replace(
            one.measured,
            image=[],  # has no tower
            question=[],
            sampled=[sampled],
            streams=[Timing("decode, 2 streams", 20, (4.0,))],
            peak_memory_bytes=None,
        ),
    )
    one = replace(one, settings=replace(settings, model="m.gguf"))
    assert cells(comparison_table([one, other])) == [
        [
            *("file", "type", "size", "bits", "image 1024x683", "first token", "prefill 10", "decode at 0"),
            *("sampled at 0", "2 streams", "peak memory"),
        ],
        [
            *("m.gguf", "Q4_0", "1.2 MB", "4.50", "5.00 s (60 %)", "7.00 s", "2.5 (25 %)", "2.3 (50 %)"),
            *("", "", "2.00 GB"),
        ],
        [
            *("other.gguf", "F16", "4.40 GB", "16.00", "", "", "2.5 (25 %)", "2.3 (50 %)"),
            *("0.8 (18 %)", "5.0", ""),
        ],
    ]
    assert "Medians of 3 on x, 2 threads, fast" in comparison_notes([one, other])


def test_names_of_files_do_not_steer_the_terminal() -> None:
    result = hand_made_result()
    result = replace(result, settings=replace(result.settings, model="a\x1b[2J\n.gguf"))
    for text in (summary_table([result]), comparison_table([result])):
        assert "\x1b" not in text and r"a\x1b[2J\n.gguf" in text


def test_csv() -> None:
    result = hand_made_result()
    rows = list(csv.DictReader(io.StringIO(as_csv_table([result, result]))))
    assert [row["what"] for row in rows[: len(rows) // 2]] == [
        *("load", "start", "image 28 x 28", "first token, photo", "prefill 10", "decode at 0")
    ]
    assert {(row["model"], row["type"], row["bits_per_weight"]) for row in rows} == {
        ("m.gguf", "Q4_0", "4.5")
    }
    image = next(row for row in rows if row["what"] == "image 28 x 28")
    assert [image[f"{name}_seconds"] for name in ("median", "least", "most")] == ["5.0", "4.0", "6.0"]
    assert (image["median_tokens_per_second"], image["floor_fraction"]) == ("2.0", "0.6")
    assert rows[0]["median_seconds"] == "0.5" and rows[0]["floor_fraction"] == ""


def test_shares_of_a_device_are_of_the_profiled_run() -> None:
    result = hand_made_result()
    result = replace(result, measured=replace(result.measured, device="NVIDIA Something"))
    profile = cells(profile_table(result))
    assert ["decode at 0", "text down_proj", "2", "3000.0", "54.5 %", "0.0 GB/s", "67 %"] in profile
    assert not any("the rest" in row for row in profile)


def test_high_rates_are_printed_in_larger_units() -> None:
    stage = Stage("text qkv", 1, 1.0, int8_ops=0, float_ops=1e13, bytes=0)
    assert stage_rate(LIMITS, stage) == "10000 GFLOP/s"
    assert stage_rate(LIMITS, replace(stage, float_ops=6.54e14)) == "654.0 TFLOP/s"
    assert stage_rate(LIMITS, replace(stage, float_ops=0, int8_ops=2e13)) == "20.0 Top/s"


def test_peak_memory_is_the_process_own() -> None:
    ballast = np.ones(50_000_000)  # 400 MB here, none of them in the process that is asked
    code = "from qwen2vl_q.stats import peak_memory_bytes; print(peak_memory_bytes())"
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
        "decode, 1 streams",
        "decode, 3 streams",
    )
    expected = [f"measuring tiny.gguf ({i} of 2): {p}" for i in (1, 2) for p in (*phases[1:], phases[0])]
    assert err.splitlines() == ["measuring tiny.gguf (1 of 2): what the machine can do", *expected]
    first, second = json.loads(out)
    assert first["model"] == second["model"] == str(tiny_gguf)
    assert set(first) == {
        *("model", "type", "file_bytes", "bits_per_weight", "device", "isa", "n_threads", "precision"),
        *("load_seconds", "start_seconds", "vision_load_seconds"),
        *("image", "question", "prefill", "decode", "sampled", "streams"),
        *("peak_memory_bytes", "limits_before", "limits_after"),
    }
    assert first["type"] == "F32" and 30 < first["bits_per_weight"] <= 32
    assert first["limits_after"] == second["limits_before"]
    assert [t["what"] for t in first["image"]] == ["image 84 x 56"]
    assert [(t["what"], t["count"]) for t in first["prefill"]] == [("prefill 20", 20), ("prefill 8", 8)]
    assert [(t["what"], t["count"]) for t in first["decode"]] == [("decode at 0", 5), ("decode at 30", 5)]
    assert [(t["what"], t["count"], t["floor_seconds"]) for t in first["streams"]] == [
        ("decode, 1 streams", 5, None),
        ("decode, 3 streams", 15, None),
    ]
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


def test_streams_are_measured_where_they_are_asked_for(run: Run, tiny_gguf: Path) -> None:
    options = ["--only", "streams", "--decode-tokens", 2, "--repeat", 1, "-t", 1]
    code, out, _ = run("bench", "-m", tiny_gguf, *options, "--streams", "2")
    _, _, seconds, rate, floor = next(row for row in cells(out) if "decode, 2 streams (4 tokens)" in row)
    assert code == 0 and "prefill" not in out
    assert seconds and rate and not floor
    code, out, _ = run("bench", "-m", tiny_gguf, *options)
    assert code == 0 and "streams" not in out


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
    text, missing, other = tmp_path / "notes.txt", tmp_path / "missing.gguf", tmp_path / "vocabulary.gguf"
    text.write_text("no model")
    writer = GGUFWriter(other, "gpt2")  # opens, but does not run
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    files = [option for file in (text, tiny_gguf, missing, other) for option in ("-m", file)]
    code, out, err = run("bench", *files, *QUICK_RUN)
    assert code == 1
    assert [row[0] for row in cells(out)] == ["file", "tiny.gguf"]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    named = zip((text, missing, other), errors, strict=True)
    assert all(str(file) in error for file, error in named), errors
    code, out, err = run("bench", "-m", text, "-m", missing, *QUICK_RUN, "--json")
    assert (code, json.loads(out), len(err.splitlines())) == (1, [], 2)
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
