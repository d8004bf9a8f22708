"""Embeddings of the images seen last."""

from __future__ import annotations

from collections import OrderedDict

from qwen2vl_q import _native


class EmbeddingCache:
    """Embeddings by key, at most `max_bytes` of them: the longest unused go first. Callers lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, _native.Embeddings] = OrderedDict()

    def get(self, key: bytes) -> _native.Embeddings | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: bytes, embeddings: _native.Embeddings) -> None:
        """Keeps `embeddings`, unless they alone exceed the bound."""
        if key in self._entries or embeddings.nbytes > self._max_bytes:
            return
        self._entries[key] = embeddings
        self._bytes += embeddings.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._entries.popitem(last=False)[1].nbytes
