"""Prints what this machine can do at most, per instruction set and number of threads.

Measure on a quiet machine, and compare figures of one run. Run `python bench/limits.py --help`.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from qwen2vl_q._native import default_thread_count, supported_isas
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.measure.limits import Limits


@click.command(help=__doc__)
@click.option("--isa", multiple=True, help="May be repeated.  [default: all that this processor has]")
@click.option(
    "-t", "--threads", multiple=True, type=click.IntRange(1, 1024), help="[default: 1 and all physical cores]"
)
@click.option("--seconds", default=0.5, show_default=True, help="For each figure.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a Markdown table.")
def main(isa: tuple[str, ...], threads: tuple[int, ...], seconds: float, as_json: bool) -> None:
    counts = threads or tuple(sorted({1, default_thread_count()}))
    results = [Limits.measure(name, n, seconds) for name in isa or supported_isas() for n in counts]
    if as_json:
        print(json.dumps([asdict(limits) for limits in results], indent=2))
        return
    heading = ("instruction set", "threads", "int8 Gop/s", "float GFLOP/s", "fp32 GFLOP/s", "read GB/s")
    rows = [
        (
            limits.isa,
            str(limits.n_threads),
            f"{limits.int8_ops_per_s / 1e9:.0f}",
            f"{limits.float_ops_per_s / 1e9:.0f}",
            f"{limits.fp32_ops_per_s / 1e9:.0f}",
            f"{limits.read_bytes_per_s / 1e9:.1f}",
        )
        for limits in results
    ]
    print(table([heading, *rows]))


if __name__ == "__main__":
    main()
