"""Prints what a busy process on one core costs a model that runs on all of them.

The process has half of that core's time, so the best that could be left of N cores' speed is (N - 1/2) / N.
Runs alternate with and without it. Linux only. Run `python bench/slow_core.py --help`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import click

from qwen2vl_q import Qwen2VL
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.measure.benchmark import Benchmark, Settings, Task

_BUSY = "import os, sys\nos.sched_setaffinity(0, [int(sys.argv[1])])\nprint(flush=True)\nwhile True: pass"


@contextmanager
def busy_process(cpu: int) -> Iterator[subprocess.Popen[bytes]]:
    """One that keeps a processor busy, stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY, str(cpu)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def run(task: Task[Any], repeat: int, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Median seconds (alone, beside the process)."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeat):
        for beside in (False, True):
            state = task.prepare()
            if beside:
                process.send_signal(signal.SIGCONT)
            seconds[beside].append(task.run(state))
            process.send_signal(signal.SIGSTOP)
    return median(seconds[False]), median(seconds[True])


@click.command(help=__doc__)
@click.option("-m", "--model", type=model_file, default="demo", show_default=True)
@click.option("-t", "--threads", type=click.IntRange(2, 1024), help="[default: all processors allowed]")
@click.option("--prompt-tokens", type=click.IntRange(2), default=512, show_default=True)
@click.option("--decode-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
def main(model: str, threads: int | None, prompt_tokens: int, decode_tokens: int, repeat: int) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    n = threads or len(cpus)
    settings = Settings(model, decode_tokens=decode_tokens)
    rows = [("what", "alone, s", "beside it, s", "speed left", "of the best possible")]
    with Qwen2VL.from_gguf(model, n) as loaded, busy_process(cpus[-1]) as process:
        bench = Benchmark(loaded, settings)
        for task in (bench.prefill(prompt_tokens), bench.decode(0)):
            alone, beside = run(task, repeat, process)
            left = alone / beside
            best = (n - 0.5) / n
            rows.append((task.what, f"{alone:.3g}", f"{beside:.3g}", f"{left:.2f}", f"{left / best:.0%}"))
    print(table(rows))


if __name__ == "__main__":
    main()
