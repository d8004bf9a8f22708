"""Which file a command's model is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from qwen2vl_q.cli.paths import typed_path

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


class _ModelFile(click.Path):
    """The type of options and arguments that name a model: "demo" is the packaged one, all else a path.

    What is not there is refused before anything is loaded: OSError, or ClickException with a way to get it.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from qwen2vl_q import DEMO_MODEL

        return str(DEMO_MODEL) if value == "demo" else _existing(typed_path(value))


def _existing(path: Path) -> str:
    if not path.exists() and path.suffix.lower() != ".gguf" and _HUB_ID.fullmatch(path.as_posix()):
        raise click.ClickException(
            f"{path}: there is no such file; if the Hugging Face hub has {_ways(path.as_posix())}"
        )
    path.stat()
    if (path / "config.json").exists():
        raise click.ClickException(
            f"{path} is a folder with a checkpoint; make a file of it: "
            f"qwen2vl-q convert {path} {path.resolve().name}.gguf"
        )
    if path.is_dir():
        raise click.ClickException(f"{path} is a folder, not a GGUF file")
    return str(path)


def _ways(hub_id: str) -> str:
    if "gguf" in hub_id.lower():
        return f"it: hf download {hub_id}, then -m the .gguf file"
    made = f"{hub_id.rsplit('/', 1)[1].lower()}.gguf"
    return f"a checkpoint of this name: qwen2vl-q convert {hub_id} {made}"


model_file = _ModelFile()
