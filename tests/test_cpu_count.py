"""Threads by default where the system grants less. Made-up systems: tests/native/test_cpu_count.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qwen2vl_q import _native

CGROUPS = Path("/sys/fs/cgroup")


def counted(*setup: str) -> tuple[int, int]:
    """(threads by default, logical processors) of a process that runs these lines first."""
    show = "print(_native.default_thread_count(), _native.machine()['logical'])"
    code = "\n".join(["import os", *setup, "from qwen2vl_q import _native", show])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    threads, logical = map(int, done.stdout.split())
    return threads, logical


def test_counts_are_consistent() -> None:
    machine = _native.machine()
    assert 1 <= machine["fast_cores"] <= machine["cores"] <= machine["logical"] <= (os.cpu_count() or 1)
    assert 1 <= _native.default_thread_count() <= machine["fast_cores"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_an_affinity_mask_counts() -> None:
    one = min(os.sched_getaffinity(0))
    assert counted(f"os.sched_setaffinity(0, [{one}])") == (1, 1)


Group = Callable[[str, str], Path]


@pytest.fixture
def group() -> Iterator[Group]:
    """Makes a cgroup below this process's own: of a controller, known by one of its files."""
    made: list[Path] = []

    def make(controller: str, files: str) -> Path:
        own = Path("/proc/self/cgroup")
        for line in own.read_text().splitlines() if own.exists() else ():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            folder = CGROUPS / controllers / path.lstrip("/") / f"qwen2vl-test-{os.getpid()}"
            with suppress(OSError):
                folder.mkdir()
                made.append(folder)
                if any(folder.glob(files)):
                    return folder
        pytest.skip(f"needs a cgroup of the {controller} controller that this user may write to")

    yield make
    for folder in made:
        folder.rmdir()


def joining(group: Path) -> str:
    return f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))"


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.5, 2), (1000, 1000)])
def test_a_cgroups_quota_counts(group: Group, quota: float, threads: int) -> None:
    folder, period = group("cpu", "cpu.[cm]*"), 100_000
    if (folder / "cpu.max").exists():
        (folder / "cpu.max").write_text(f"{round(quota * period)} {period}")
    else:
        (folder / "cpu.cfs_period_us").write_text(f"{period}")
        (folder / "cpu.cfs_quota_us").write_text(f"{round(quota * period)}")
    assert counted(joining(folder))[0] == min(threads, _native.machine()["fast_cores"])


def test_a_cpuset_counts(group: Group) -> None:
    folder = group("cpuset", "cpuset.cpus")
    if not (folder / "cpuset.mems").read_text().strip():
        (folder / "cpuset.mems").write_text("0")
    (folder / "cpuset.cpus").write_text(f"{min(os.sched_getaffinity(0))}")
    assert counted(joining(folder)) == (1, 1)
