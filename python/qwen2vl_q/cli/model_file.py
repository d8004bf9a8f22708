"""Which file a command's model is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from qwen2vl_q.cli.hub_name import cached_names
from qwen2vl_q.cli.paths import typed_path


class ModelPath(str):
    """A model's file, and its vision tower's where the hub has it apart."""

    mmproj: str | None = None

    @classmethod
    def of(cls, model: str, mmproj: str | None) -> ModelPath:
        path = cls(model)
        path.mmproj = mmproj
        return path


def tower_of(model: str) -> str | None:
    return model.mmproj if isinstance(model, ModelPath) else None


class _ModelFile(click.Path):
    """The type of options and arguments that name a model: "demo" is the packaged one, what exists a path,
    what reads as a name of the hub is found in the cache or fetched into it.

    What cannot be had is refused before anything is loaded.
    """

    def __init__(self, hub: bool) -> None:
        super().__init__()
        self._hub = hub

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelPath:
        from qwen2vl_q import DEMO_MODEL

        if isinstance(value, ModelPath) or (ctx is not None and ctx.resilient_parsing):
            return ModelPath(value)
        if value == "demo":
            return ModelPath(DEMO_MODEL)
        path = typed_path(value)
        if self._hub and not path.exists():
            from qwen2vl_q.hub.names import SPELLING, HubName

            if HubName.reads_as(value):
                return _from_hub(HubName.parse(value))
            if path.suffix.lower() != ".gguf" and not any(separator in value for separator in "/\\"):
                raise click.ClickException(
                    f"{value}: there is no such file; expected a GGUF file, a name of the Hugging Face hub, "
                    f"{SPELLING}, or demo"
                )
        return ModelPath(_existing(path))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        files = super().shell_complete(ctx, param, incomplete)
        return files + cached_names(incomplete) if self._hub and incomplete else files


def _existing(path: Path) -> Path:
    path.stat()
    if (path / "config.json").exists():
        raise click.ClickException(
            f"{path} is a folder with a checkpoint; make a file of it: "
            f"qwen2vl-q convert {path} {path.resolve().name}.gguf"
        )
    if path.is_dir():
        raise click.ClickException(f"{path} is a folder, not a GGUF file")
    return path


def _from_hub(name: Any) -> ModelPath:
    from qwen2vl_q.cli.interruption import ended_by_signal
    from qwen2vl_q.cli.output import say
    from qwen2vl_q.cli.progress import StageBars
    from qwen2vl_q.hub.models import Models

    with ended_by_signal(f"{name} is not fetched"), StageBars() as bars:
        entry = Models(tell=say, progress=bars).get(name)
    return ModelPath.of(entry.model, entry.mmproj)


class _ModelOrCheckpoint(_ModelFile):
    """A folder with a checkpoint will do, too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelPath:
        path = typed_path(value)
        if (path / "config.json").is_file():
            return ModelPath(path)
        return super().convert(value, param, ctx)


model_file = _ModelFile(hub=True)
model_or_checkpoint = _ModelOrCheckpoint(hub=True)
tower_file = _ModelFile(hub=False)
