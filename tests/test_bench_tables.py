"""What follows from measurements: floors, tables, CSV, JSON."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

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
from qwen2vl_q.engine.stats import Stage
from qwen2vl_q.measure.benchmark import Measured, Settings, Timing
from qwen2vl_q.measure.limits import Limits, mean_stages
from tables import cells

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
    assert ["", "image 28 x 28 (10 tokens)", "5.00 (4.00 to 6.00)", "2.0 (1.7 to 2.5)", "60 %", ""] in summary
    assert ["", "first token, photo (20 tokens)", "7.00 (7.00 to 7.00)", "", "", ""] in summary
    profile = cells(profile_table(hand_made_result()))
    assert ["decode at 0", "text down_proj", "2", "3000.0", "68.2 %", "0.0 GB/s", "67 %"] in profile
    assert ["decode at 0", "text norm", "4", "500.0", "11.4 %", "", ""] in profile
    assert ["decode at 0", "the rest", "", "-1100.0", "-25.0 %", "", ""] in profile


def test_one_table_compares_files() -> None:
    one = hand_made_result()
    sampled = Timing("decode at 0, sampled", 10, (5.0, 20.0), STAGES)
    settings = replace(one.settings, model="other.gguf", prompt_tokens=(10,), streams=(2, 1))
    other = replace(
        one,
        settings=settings,
        file=FileSummary("F16", 4_400_000_000, 16.0),
        measured=replace(
            one.measured,
            image=[],  # has no tower
            question=[],
            sampled=[sampled],
            streams=[
                Timing("2 streams, decode at 32", 20, (4.0,)),
                Timing("1 stream, decode at 32", 10, (5.0,)),
            ],
            peak_memory_bytes=None,
        ),
    )
    one = replace(one, settings=replace(settings, model="m.gguf"))
    assert cells(comparison_table([one, other])) == [
        [
            *("file", "type", "size", "bits", "image 1024x683", "first token", "prefill 10", "decode at 0"),
            *("sampled at 0", "2 streams", "1 streams", "peak memory"),
        ],
        [
            *("m.gguf", "Q4_0", "1.2 MB", "4.50", "5.00 s (60 %)", "7.00 s", "2.5 (25 %)", "2.3 (50 %)"),
            *("", "", "", "2.00 GB"),
        ],
        [
            *("other.gguf", "F16", "4.40 GB", "16.00", "", "", "2.5 (25 %)", "2.3 (50 %)"),
            *("0.8 (18 %)", "5.0 (2.50 x)", "2.0 (1.00 x)", ""),
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
