"""What a machine can do at most, and what a stage of a forward pass takes at least on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import chain

from qwen2vl_q import _native
from qwen2vl_q.base.errors import DeviceError
from qwen2vl_q.engine.devices import cuda_devices, require_plugin
from qwen2vl_q.engine.stats import Stage


@dataclass(frozen=True)
class Limits:
    """Ceilings of one instruction set with a number of threads, all of them together, or of a device."""

    isa: str  # or the device's name
    n_threads: int  # 0: of a device
    int8_ops_per_s: float
    float_ops_per_s: float  # bf16 products where the instruction set or the device has them, else fp32
    fp32_ops_per_s: float
    read_bytes_per_s: float

    @classmethod
    def measure(cls, isa: str = "", n_threads: int = 0, seconds: float = 0.5) -> Limits:
        """Runs the loops of `_native.measure_limits`, with its errors."""
        rates = _native.measure_limits(isa, n_threads, seconds)
        return cls(isa or _native.supported_isas()[0], n_threads or _native.default_thread_count(), **rates)

    @classmethod
    def measure_device(cls, index: int, seconds: float = 0.5) -> Limits:
        """Of the plug-in's device of that index. DeviceError where there is none."""
        devices = cuda_devices()
        if index >= len(devices):
            raise DeviceError(f"device cuda:{index}: there is no such device, only {len(devices)}")
        rates = _native.measure_device_limits(require_plugin(), index, seconds)
        return cls(devices[index].name, 0, **rates)

    def better(self, other: Limits) -> Limits:
        """The higher of each rate: what else a machine does can only lower a measurement of its ceiling."""
        rates = {
            name: max(value, getattr(other, name))
            for name, value in vars(self).items()
            if name not in ("isa", "n_threads")
        }
        return Limits(self.isa, self.n_threads, **rates)

    def for_precision(self, precision: str) -> Limits:
        """ "exact" multiplies in float32, whatever faster the instruction set has."""
        if precision != "exact":
            return self
        return Limits(**{**vars(self), "float_ops_per_s": self.fp32_ops_per_s})

    # --- floors, in seconds ---

    def compute_floor(self, stages: Iterable[Stage]) -> float:
        """8-bit operations at their peak, then floating-point ones at theirs."""
        return sum(s.int8_ops / self.int8_ops_per_s + s.float_ops / self.float_ops_per_s for s in stages)

    def read_floor(self, stages: Iterable[Stage]) -> float:
        """Bytes that no cache can hold, at the speed of memory."""
        return sum(s.bytes for s in stages) / self.read_bytes_per_s

    def image_floor(self, stages: Iterable[Stage]) -> float:
        return self.compute_floor(stages)

    def prefill_floor(self, stages: Iterable[Stage]) -> float:
        """Of the linear layers alone: attention is small in a short prompt."""
        return self.compute_floor(s for s in stages if not s.is_attention)

    def decode_floor(self, stages: Iterable[Stage]) -> float:
        """Weights once, and the keys and values of the context."""
        return self.read_floor(stages)

    def stage_floor(self, stage: Stage) -> float:
        """By arithmetic or by memory, whichever is slower; 0 for a stage of which neither is known."""
        return max(self.compute_floor([stage]), self.read_floor([stage]))


def mean_stages(runs: Sequence[Iterable[Stage]]) -> tuple[Stage, ...]:
    """Of equal runs, each stage's mean."""
    totals: dict[str, list[float]] = {}
    for stage in chain.from_iterable(runs):
        numbers = astuple(stage)[1:]
        so_far = totals.get(stage.name, [0.0] * len(numbers))
        totals[stage.name] = [a + b for a, b in zip(so_far, numbers, strict=True)]
    return tuple(Stage(name, *(total / len(runs) for total in sums)) for name, sums in totals.items())
