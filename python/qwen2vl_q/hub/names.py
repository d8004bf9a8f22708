"""Names of models on the hub, as users type them: owner/name[:TYPE][@REVISION], with hf: before or not."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwen2vl_q.base.printable import printable

PREFIX = "hf:"
SPELLING = "owner/name[:TYPE][@REVISION]"

_WORD = r"[A-Za-z0-9_][\w.-]{0,95}"
_NAME = re.compile(
    rf"(?P<repository>{_WORD}/{_WORD})(?::(?P<type>[\w.-]{{1,200}}))?(?:@(?P<revision>[\w./-]{{1,200}}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    repository: str  # owner/name
    type: str | None = None  # of the weights, Q4_K_M; or a file's name
    revision: str | None = None  # a branch, a tag or a commit

    @classmethod
    def parse(cls, text: str) -> HubName:
        """ValueError for what is no such name."""
        match = _NAME.fullmatch(text.removeprefix(PREFIX))
        if match is None or any(odd in match["repository"] for odd in ("--", "..")):  # the hub's own rules
            raise ValueError(f"expected {SPELLING}, found '{printable(text)}'")
        return cls(match["repository"], match["type"], match["revision"])

    @classmethod
    def reads_as(cls, text: str) -> bool:
        """Whether `text` is meant as such a name: with hf: before it, or one that is no path to a file."""
        if text.startswith(PREFIX):
            return True
        return _NAME.fullmatch(text) is not None and not text.lower().endswith(".gguf")

    @property
    def title(self) -> str:
        """For people: Qwen2 VL 2B Instruct."""
        return self.repository.rsplit("/", 1)[1].replace("-", " ")

    def __str__(self) -> str:
        type = f":{self.type}" if self.type else ""
        return f"{self.repository}{type}" + (f"@{self.revision}" if self.revision else "")
