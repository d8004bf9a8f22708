"""quantization_config of a checkpoint: how its matrices are packed, and which packings are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.json_files import quoted, read_json_if_present
from qwen2vl_q.base.printable import printable

_MAX_GROUP = 1 << 20


@dataclass(frozen=True)
class Packing:
    method: str  # "GPTQ", "AWQ" or "bitsandbytes"
    bits: int
    group_size: int  # columns that share a scale and a zero point; 0: a whole row
    zero_offset: int = 0  # what is added to a stored zero point

    def __str__(self) -> str:
        return f"{self.method} {self.bits} bit"


def read_packing(path: Path, config: Mapping[str, object]) -> Packing | None:
    """Of config.json at `path`, or quantize_config.json beside it, which older GPTQ writers left; None for a
    checkpoint that is not packed.

    Raises UnsupportedError for a method that is not read, by its name, FormatError for bad values.
    """
    section = config.get("quantization_config")
    if section is None:
        beside = path.with_name("quantize_config.json")
        section = {"quant_method": "gptq", **read_json_if_present(beside)} if beside.exists() else None
        path = beside
    if section is None:
        return None
    if not isinstance(section, dict):
        raise FormatError(f"{path}: quantization_config: expected an object, found {quoted(section)}")
    match section.get("quant_method"):
        case "gptq":
            return _gptq(path, section)
        case "awq":
            return _awq(path, section)
        case "bitsandbytes":
            if section.get("load_in_4bit") is not True:
                raise _unsupported(path, "load_in_4bit", "true", quoted(section.get("load_in_4bit")))
            return Packing("bitsandbytes", 4, 0)
        case method:
            raise UnsupportedError(
                f"{path}: quant_method: expected 'gptq', 'awq' or 'bitsandbytes', found {quoted(method)}: "
                "convert the original checkpoint instead"
            )


def _gptq(path: Path, section: Mapping[str, object]) -> Packing:
    layout = section.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
        raise _unsupported(path, "checkpoint_format", "'gptq' or 'gptq_v2'", quoted(layout))
    overrides = section.get("dynamic") or {}
    if not isinstance(overrides, dict) or any(not str(rule).startswith("-:") for rule in overrides):
        raise _unsupported(path, "dynamic", "no settings of single modules", printable(overrides))
    return Packing("GPTQ", _bits(path, section, (4, 8)), _group_size(path, section), int(layout == "gptq"))


def _awq(path: Path, section: Mapping[str, object]) -> Packing:
    version = str(section.get("version") or section.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(path, "version", "'gemm'", quoted(version))
    if section.get("zero_point") is False:
        raise _unsupported(path, "zero_point", "true", "false")
    return Packing("AWQ", _bits(path, section, (4,)), _group_size(path, section))


def _unsupported(path: Path, key: str, expected: str, found: str) -> UnsupportedError:
    return UnsupportedError(f"{path}: quantization_config.{key}: expected {expected}, found {found}")


def _bits(path: Path, section: Mapping[str, object], read: tuple[int, ...]) -> int:
    bits = section.get("bits", section.get("w_bit"))
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in read:
        raise _unsupported(path, "bits", " or ".join(map(str, read)), quoted(bits))
    return bits


def _group_size(path: Path, section: Mapping[str, object]) -> int:
    size = section.get("group_size", section.get("q_group_size"))
    if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and not 0 < size <= _MAX_GROUP):
        raise FormatError(
            f"{path}: quantization_config.group_size: expected -1 or from 1 to {_MAX_GROUP}, "
            f"found {quoted(size)}"
        )
    return max(size, 0)
