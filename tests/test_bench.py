"""The machine's limits, the floors that follow from them, and the command that prints both."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.benchmark import Benchmark, Measured, Settings, Timing, drawn_picture
from qwen2vl_q.cli.bench import Result, as_dict, limits_line, profile_table, stage_rate, summary_table
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
    return Result(Settings("m.gguf"), 1000, measured, slower, LIMITS)


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
    summary = summary_table([hand_made_result()]).splitlines()
    assert "|  | image 28 x 28 (10 tokens) | 5.00 (4.00 to 6.00) | 2.0 (1.7 to 2.5) | 60 % |" in summary
    assert "|  | first token, photo (20 tokens) | 7.00 (7.00 to 7.00) |  |  |" in summary
    profile = profile_table(hand_made_result()).splitlines()
    assert "| decode at 0 | text down_proj | 2 | 3000.0 | 68.2 % | 0.0 GB/s | 67 % |" in profile
    assert "| decode at 0 | text norm | 4 | 500.0 | 11.4 % |  |  |" in profile
    assert "| decode at 0 | the rest |  | -1100.0 | -25.0 % |  |  |" in profile
    assert len({line.count("|") for line in profile}) == 1


def test_shares_of_a_device_are_of_the_profiled_run() -> None:
    result = hand_made_result()
    result = replace(result, measured=replace(result.measured, device="NVIDIA Something"))
    profile = profile_table(result).splitlines()
    assert "| decode at 0 | text down_proj | 2 | 3000.0 | 54.5 % | 0.0 GB/s | 67 % |" in profile
    assert not any("the rest" in line for line in profile)


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
    assert err.count("measuring") == 2
    first, second = json.loads(out)
    assert first["model"] == second["model"] == str(tiny_gguf)
    assert set(first) == {
        *("model", "device", "isa", "n_threads", "precision", "file_bytes", "load_seconds", "start_seconds"),
        *("vision_load_seconds", "image", "question", "prefill", "decode", "streams"),
        *("peak_memory_bytes", "limits_before", "limits_after"),
    }
    assert [t["what"] for t in first["image"]] == ["image 84 x 56"]
    assert [(t["what"], t["count"]) for t in first["prefill"]] == [("prefill 20", 20), ("prefill 8", 8)]
    assert [(t["what"], t["count"]) for t in first["decode"]] == [("decode at 0", 5), ("decode at 30", 5)]
    assert [(t["what"], t["count"], t["floor_seconds"]) for t in first["streams"]] == [
        ("decode, 1 streams", 5, None),
        ("decode, 3 streams", 15, None),
    ]
    assert len(first["question"]) == 3 and first["start_seconds"] > first["load_seconds"] > 0
    assert first["vision_load_seconds"] >= 0
    for timing in (t for part in ("image", "question", "prefill", "decode", "streams") for t in first[part]):
        assert len(timing["seconds"]) == 2 and min(timing["seconds"]) > 0
        assert timing["median_tokens_per_second"] > 0
    for timing in (t for part in ("image", "prefill", "decode", "streams") for t in first[part]):
        prefix = "image" if timing["what"].startswith("image") else "text"
        assert timing["stages"] and all(stage["name"].startswith(prefix) for stage in timing["stages"])
    for timing in (t for part in ("image", "prefill", "decode") for t in first[part]):
        assert timing["floor_seconds"] > 0
        assert timing["floor_fraction"] == timing["floor_seconds"] / timing["median_seconds"]
    for timing in first["decode"]:
        assert len(timing["read_bytes_per_s"]) == 3 and min(timing["read_bytes_per_s"]) > 0


def test_reading_the_weights_reads_what_a_token_reads(tiny_gguf: Path) -> None:
    model = Qwen2VL.from_gguf(tiny_gguf)
    # All of it, but for what is left of a matrix behind whole pages.
    assert 0 < model.read_weights() <= model._native.weight_bytes


def test_streams_are_measured_where_they_are_asked_for(run: Run, tiny_gguf: Path) -> None:
    options = ["--only", "streams", "--decode-tokens", 2, "--repeat", 1, "-t", 1]
    code, out, _ = run("bench", "-m", tiny_gguf, *options, "--streams", "2")
    row = next(line for line in out.splitlines() if "decode, 2 streams (4 tokens)" in line)
    assert code == 0 and "prefill" not in out
    _, seconds, rate, floor = (cell.strip() for cell in row.strip("|").split("|")[1:])
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
    for timing in (bench.prefill(8), bench.decode(0), bench.streams(2), *bench.images()):
        assert len(timing.seconds) == 2 and timing.stages
    once = [("text", False), ("text", False), ("text", True)]
    assert model.runs == [*once, *once, *(("image", profiled) for _, profiled in once)]


def test_bench_prints_a_part(run: Run, tiny_gguf: Path) -> None:
    code, out, _ = run("bench", "-m", tiny_gguf, "--only", "decode", "--repeat", 1, "-t", 1)
    assert code == 0
    assert "| decode at 0 (64 tokens)" in out.replace("|  |", "|") and "prefill" not in out
    assert "Limits of " in out


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
