"""What this machine has, and why its kernels are what they are."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from qwen2vl_q import _native

# What each instruction set asks of a processor, best first, in the names of Linux's /proc/cpuinfo.
_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512_bf16": ("avx512_bf16",),
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        "avxvnni": ("avx_vnni",),
        "avx2": ("avx2", "fma", "f16c"),
    },
    "aarch64": {
        "i8mm": ("i8mm", "bf16"),
        "dotprod": ("asimddp",),
        "neon": ("asimd",),
    },
}
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class InstructionSet:
    """`lacks`: what the processor would need for it, as far as it is known (Linux), else all that it needs;
    empty where it runs, or where this build has no such kernels."""

    name: str
    runs: bool
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Processors:
    """What this process may use."""

    logical: int
    cores: int  # physical
    fast_cores: int  # where there are two kinds, else all
    cpu_quota: float | None  # processors' worth of time that a cgroup grants
    threads: int  # by default

    @property
    def limited_by_quota(self) -> bool:
        return self.cpu_quota is not None and ceil(self.cpu_quota) < self.fast_cores


@dataclass(frozen=True)
class Memory:
    """Bytes; None where the system does not say. `available`: without swapping and within the cgroup."""

    total: int | None
    available: int | None
    limit: int | None  # the cgroup's


@dataclass(frozen=True)
class Machine:
    system: str
    processor: str
    processors: Processors
    memory: Memory
    isa: str
    forced: bool  # by QWEN2VL_ISA
    sets: tuple[InstructionSet, ...]  # best first


def this_machine() -> Machine:
    """ValueError for a QWEN2VL_ISA that is not supported."""
    name, features = _processor()
    isa, forced = isa_in_use()
    return Machine(
        f"{platform.system()} {platform.machine()}",
        name,
        _processors(),
        _memory(),
        isa,
        forced,
        instruction_sets(_native.supported_isas(), platform.machine(), features),
    )


def isa_in_use() -> tuple[str, bool]:
    """(instruction set, whether QWEN2VL_ISA forces it). ValueError for one that is not supported."""
    available = _native.supported_isas()
    forced = os.environ.get("QWEN2VL_ISA", "")
    if forced and forced not in available:
        raise ValueError(f"QWEN2VL_ISA: expected one of {', '.join(available)}, found {forced!r}")
    return forced or available[0], bool(forced)


def instruction_sets(
    supported: list[str], machine: str, features: frozenset[str] | None
) -> tuple[InstructionSet, ...]:
    """All that there are for such a machine. `features`: the processor's, None where they are not known."""
    needs = _NEEDS.get(_MACHINES.get(machine.lower(), machine), {})
    names = [*needs, *(name for name in supported if name not in needs)]

    def lacks(name: str) -> tuple[str, ...]:
        return tuple(each for each in needs[name] if features is None or each not in features)

    return tuple(
        InstructionSet(name, name in supported, () if name in supported else lacks(name)) for name in names
    )


def _processors() -> Processors:
    found = _native.machine()
    return Processors(
        found["logical"],
        found["cores"],
        found["fast_cores"],
        found["cpu_quota"],
        _native.default_thread_count(),
    )


def _processor() -> tuple[str, frozenset[str] | None]:
    """(name, features), by Linux's /proc/cpuinfo; elsewhere what Python says."""
    name, features = platform.processor(), None
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                features = frozenset(value.split())
    return name, features


def _memory() -> Memory:
    total, available = _windows_memory() if sys.platform == "win32" else _posix_memory()
    limit = _native.machine()["memory_limit"]
    if limit is None:
        return Memory(total, available, None)
    limit = int(limit)
    return Memory(total, limit if available is None else min(available, limit), limit)


def _posix_memory() -> tuple[int | None, int | None]:
    """(total, available)."""
    total = None
    with suppress(ValueError, OSError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text("ascii", "replace").splitlines():
            if line.startswith("MemAvailable:"):
                return total, int(line.split()[1]) * 1024
    return total, None


def _windows_memory() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        """MEMORYSTATUSEX."""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        return None, None
    return int(status.total), int(status.available)
