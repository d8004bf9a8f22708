"""Devices beside the CPU: the plug-in that brings them, and what it finds.

The plug-in is a shared library: the file that the environment variable QWEN2VL_CUDA_PLUGIN names, else that
of the installed package qwen2vl-q-cuda, else one that was built beside the native core.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qwen2vl_q import _native
from qwen2vl_q.base.errors import DeviceError
from qwen2vl_q.base.printable import printable

PLUGIN_VARIABLE = "QWEN2VL_CUDA_PLUGIN"
_PACKAGE = "qwen2vl_q_cuda"
_LIBRARY = "qwen2vl_cuda.dll" if sys.platform == "win32" else "libqwen2vl_cuda.so"
_NAMES = re.compile(r"([a-z0-9_]+)(?::(0|[1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Device:
    """A device of the plug-in. `capability` is CUDA's compute capability, (9, 0)."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    multiprocessors: int


def require_name(device: str) -> str:
    """`device`, or ValueError where no device could be called that."""
    match = _NAMES.fullmatch(device) if isinstance(device, str) else None
    if match is None or (match[2] and match[1] in ("cpu", "auto")):
        raise ValueError(
            "device: expected cpu, cuda, cuda:N (its N-th device, from 0) or auto, "
            f"found {printable(repr(device))}"
        )
    return device


def cuda_plugin() -> str | None:
    """The plug-in's library, or None where none is installed.

    DeviceError where QWEN2VL_CUDA_PLUGIN names a file that is not there.
    """
    if named := os.environ.get(PLUGIN_VARIABLE):
        if not Path(named).is_file():
            raise DeviceError(
                f"{PLUGIN_VARIABLE}: expected the path of a plug-in library, found {printable(repr(named))}"
            )
        return named
    folders = [Path(_native.__file__).parent]
    if (package := find_spec(_PACKAGE)) is not None:
        folders = [Path(folder) for folder in package.submodule_search_locations or ()] + folders
    return next((str(folder / _LIBRARY) for folder in folders if (folder / _LIBRARY).is_file()), None)


def plugin_for(device: str) -> str | None:
    """What `_native.Model` takes as `plugin` beside `device`. DeviceError where there is none for it."""
    name = device.partition(":")[0]
    return None if name == "cpu" else require_plugin() if name == "cuda" else cuda_plugin()


def require_plugin() -> str:
    """DeviceError where none is installed."""
    plugin = cuda_plugin()
    if plugin is None:
        raise DeviceError("device cuda: its plug-in is not installed; pip install qwen2vl-q-cuda brings it")
    return plugin


def cuda_devices() -> list[Device]:
    """Of the plug-in. DeviceError, saying why, where there are none or no plug-in is installed."""
    return [
        Device(
            index,
            found["name"],
            found["total_bytes"],
            found["free_bytes"],
            divmod(found["compute_capability"], 10),
            found["multiprocessors"],
        )
        for index, found in enumerate(_native.plugin_devices(require_plugin()))
    ]


def cuda_index(device: str) -> int | None:
    """Of "cuda" and "cuda:N"; None of others. "auto" is the first device where there is one."""
    name, _, index = require_name(device).partition(":")
    if name == "auto":
        try:
            return cuda_devices()[0].index
        except DeviceError:
            return None
    return int(index or 0) if name == "cuda" else None
