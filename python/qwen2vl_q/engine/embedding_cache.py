"""Embeddings of the images seen last."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray


class EmbeddingCache:
    """Arrays by key, at most `max_bytes` of them: the longest unused go first. Callers lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, embeddings: NDArray[np.float32]) -> None:
        """Keeps `embeddings`, made read-only, unless they alone exceed the bound."""
        if key in self._entries or embeddings.nbytes > self._max_bytes:
            return
        embeddings.flags.writeable = False
        self._entries[key] = embeddings
        self._bytes += embeddings.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes
