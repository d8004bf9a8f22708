"""All that `qwen2vl-q doctor` finds: the machine, its devices and limits, what to expect, what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from qwen2vl_q.base.errors import DeviceError
from qwen2vl_q.engine.devices import Device, cuda_devices, cuda_plugin
from qwen2vl_q.measure.expectation import SHAPES, Expectation, expect
from qwen2vl_q.measure.limits import Limits
from qwen2vl_q.measure.machine import Machine, this_machine

_SECONDS_A_FIGURE = 0.8  # five or six figures: about five seconds in all
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_EXTRAS = {"plot": ("matplotlib", "bench --types --plot")}  # extra: its module, what it is for


@dataclass(frozen=True)
class Finding:
    """A problem is what should work here and does not; a hint is what could be better."""

    kind: Literal["problem", "hint"]
    text: str


@dataclass(frozen=True)
class Checkup:
    machine: Machine
    devices: tuple[Device, ...]
    limits: Limits | None  # None and empty: not measured
    expectations: tuple[Expectation, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return all(finding.kind != "problem" for finding in self.findings)


def check_up(measure: bool = True) -> Checkup:
    """Takes about five seconds and, meanwhile, 512 MiB where it measures. ValueError for a QWEN2VL_ISA that
    is not supported."""
    machine = this_machine()
    devices, device_findings = _devices()
    limits = Limits.measure(machine.isa, machine.processors.threads, _SECONDS_A_FIGURE) if measure else None
    expectations = () if limits is None else tuple(expect(shape, limits) for shape in SHAPES)
    findings = (
        *device_findings,
        *_about_kernels(machine),
        *_about_processors(machine),
        *_about_memory(machine, expectations),
        *_about_extras(),
    )
    return Checkup(machine, devices, limits, expectations, findings)


def _devices() -> tuple[tuple[Device, ...], list[Finding]]:
    try:
        if cuda_plugin() is not None:
            return tuple(cuda_devices()), []
    except DeviceError as error:
        return (), [Finding("problem", str(error))]
    if not _NVIDIA_DRIVER.exists():
        return (), []
    text = "an NVIDIA driver is here, but not qwen2vl-q-cuda, which computes on its GPU (README, On a GPU)"
    return (), [Finding("hint", text)]


def _about_kernels(machine: Machine) -> list[Finding]:
    best = next(each.name for each in machine.sets if each.runs)
    if machine.isa == best:
        return []
    return [
        Finding("hint", f"QWEN2VL_ISA forces {machine.isa}; without it {best} would be used, which is faster")
    ]


def _about_processors(machine: Machine) -> list[Finding]:
    found, processors = [], machine.processors
    if processors.limited_by_quota:
        text = (
            f"the cgroup's quota is {processors.cpu_quota:g} processors of {processors.fast_cores} fast cores"
        )
        found.append(Finding("hint", text))
    if slower := processors.cores - processors.fast_cores:
        text = f"{slower} slower cores are left out: -t {processors.cores} would use them, compare with bench"
        found.append(Finding("hint", text))
    return found


def _about_memory(machine: Machine, expectations: Sequence[Expectation]) -> list[Finding]:
    available = machine.memory.available
    if available is None:
        return []
    return [
        Finding(
            "hint" if i > 0 else "problem",  # where the smallest does not fit, nothing does
            f"a {each.model} takes about {each.memory_bytes / 1e9:.1f} GB, "
            f"but {available / 1e9:.1f} GB of memory are available",
        )
        for i, each in enumerate(expectations)
        if each.memory_bytes > available
    ]


def _about_extras() -> list[Finding]:
    return [
        Finding("hint", f"{purpose} needs {module}: pip install 'qwen2vl-q[{extra}]'")
        for extra, (module, purpose) in _EXTRAS.items()
        if find_spec(module) is None
    ]
