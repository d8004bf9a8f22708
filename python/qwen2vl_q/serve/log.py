"""One line a request, without what it said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from qwen2vl_q.base.printable import printable

Write = Callable[[str], None]


@dataclass
class Record:
    """Of one request: what its handling adds to `more` stands in its line."""

    method: str
    path: str
    client: str
    status: int = 0
    seconds: float = 0.0
    error: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def as_text(record: Record) -> str:
    more = "".join(f" {name}={value}" for name, value in record.more.items())
    error = f" error={printable(record.error, 300)!r}" if record.error else ""
    path = printable(record.path, 100)
    head = f"{_now()} {record.client} {record.method} {path} {record.status} {record.seconds:.3f}s"
    return f"{head}{more}{error}"


def as_json(record: Record) -> str:
    line = {
        "time": _now(),
        "client": record.client,
        "method": record.method,
        "path": record.path[:100],
        "status": record.status,
        "seconds": round(record.seconds, 6),
        **record.more,
    }
    if record.error:
        line["error"] = record.error[:300]
    return json.dumps(line)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
