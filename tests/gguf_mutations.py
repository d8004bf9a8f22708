"""Damaged GGUF files that are nearly whole: changes where the format has its numbers, names and entries."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of value types in bytes
_STRING, _ARRAY = 8, 9
_WALKED_ITEMS = 4  # of an array
Span = tuple[int, int]


@dataclass
class Places:
    """Where a file has what, as (begin, end)."""

    numbers: list[Span] = field(default_factory=list)
    names: list[Span] = field(default_factory=list)
    keys: list[Span] = field(default_factory=list)
    tensors: list[Span] = field(default_factory=list)
    head: int = 0  # bytes before the padding


class _Walk:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 4
        self.places = Places()
        _, n_tensors, n_keys = self._number(4), self._number(8), self._number(8)
        self.places.keys = [self._entry(self._key) for _ in range(n_keys)]
        self.places.tensors = [self._entry(self._tensor) for _ in range(n_tensors)]
        self.places.head = self._at

    def _number(self, size: int) -> int:
        span = self._at, self._at + size
        self._at += size
        self.places.numbers.append(span)
        return int.from_bytes(self._data[slice(*span)], "little")

    def _string(self) -> None:
        length = self._number(8)
        if length:
            self.places.names.append((self._at, self._at + length))
        self._at += length

    def _entry(self, walk: Callable[[], None]) -> Span:
        begin = self._at
        walk()
        return begin, self._at

    def _key(self) -> None:
        self._string()
        self._value(self._number(4))

    def _value(self, type: int) -> None:
        if type == _STRING:
            self._string()
        elif type == _ARRAY:
            item, length = self._number(4), self._number(8)
            for i in range(length):
                if i < _WALKED_ITEMS:
                    self._value(item)
                elif item == _STRING:
                    self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
                else:
                    self._at += _SIZES[item]
        else:
            self._number(_SIZES[type])

    def _tensor(self) -> None:
        self._string()
        for _ in range(self._number(4)):
            self._number(8)
        self._number(4)
        self._number(8)


def places(data: bytes) -> Places:
    return _Walk(data).places


def mutated(data: bytes, where: Places, rng: np.random.Generator) -> bytes:
    """One or two changes."""
    changed = bytearray(data)
    change = [_number, _number, _number, _name, _swap, _repeat, _drop, _cut, _noise]
    for _ in range(rng.integers(1, 3)):
        change[rng.integers(len(change))](changed, where, rng)
    return bytes(changed)


def _any(spans: list[Span], rng: np.random.Generator) -> Span:
    return spans[rng.integers(len(spans))]


def _number(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    begin, end = _any(where.numbers, rng)
    bits = 8 * (end - begin)
    old = int.from_bytes(data[begin:end], "little")
    power = 1 << int(rng.integers(bits))
    near = [old + 1, old - 1, old * 2, old ^ power]
    values = [0, 1, *near, power, power - 1, -1, -power, int(rng.integers(256))]
    value = values[rng.integers(len(values))]
    data[begin:end] = (value % (1 << bits)).to_bytes(end - begin, "little")


def _name(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    begin, end = _any(where.names, rng)
    place = rng.integers(begin, end)
    data[place : place + 1] = rng.bytes(1)


def _swap(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    """One entry's bytes over another's, as many as that has."""
    spans = where.keys if rng.integers(2) else where.tensors
    (a, b), (c, d) = _any(spans, rng), _any(spans, rng)
    size = min(b - a, d - c)
    data[a : a + size] = data[c : c + size]


def _repeat(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    """An entry twice, so that everything behind it moves."""
    begin, end = _any(where.keys + where.tensors, rng)
    data[end:end] = data[begin:end]


def _drop(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    begin, end = _any(where.keys + where.tensors, rng)
    del data[begin:end]


def _cut(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    del data[rng.integers(4, where.head if rng.integers(2) else len(data)) :]


def _noise(data: bytearray, where: Places, rng: np.random.Generator) -> None:
    for place in rng.integers(where.head, size=rng.integers(1, 9)):
        data[place : place + 1] = rng.bytes(1)
