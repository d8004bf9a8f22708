"""A file's keys, and their bytes in GGUF."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

from gguf import GGUFValueType as T

ARCHITECTURE = "qwen2vl"
_SCALARS = {
    T.UINT8: "<B",
    T.INT8: "<b",
    T.UINT16: "<H",
    T.INT16: "<h",
    T.UINT32: "<I",
    T.INT32: "<i",
    T.FLOAT32: "<f",
    T.BOOL: "<?",
    T.UINT64: "<Q",
    T.INT64: "<q",
    T.FLOAT64: "<d",
}


class AnyEntry(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def encoded(self) -> bytes:
        """Name, type and value."""


@dataclass(frozen=True)
class Entry:
    """The items of an array are of the type that their first one has in Python."""

    key: str
    value: object
    type: T

    @property
    def encoded(self) -> bytes:
        return string(self.key) + struct.pack("<I", self.type) + _value(self.value, self.type)


@dataclass(frozen=True)
class StoredEntry:
    """Of a file that there is: to be written as it stands."""

    key: str
    encoded: bytes


def string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: object, type: T) -> bytes:
    if type is T.STRING:
        assert isinstance(value, str)
        return string(value)
    if type is not T.ARRAY:
        return struct.pack(_SCALARS[type], value)
    assert isinstance(value, list) and value
    item = T.get_type(value[0])
    return struct.pack("<IQ", item, len(value)) + b"".join(_value(v, item) for v in value)
