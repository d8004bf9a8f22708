"""Names of models on the hub as arguments."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from qwen2vl_q.hub.names import HubName


def cached_names(incomplete: str) -> list[CompletionItem]:
    """What Tab offers of the cache."""
    from qwen2vl_q.hub.cache import Cache

    names = (str(entry.name) for entry in Cache().entries())
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _HubName(click.ParamType):  # type: ignore[type-arg]
    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> HubName:
        if isinstance(value, HubName):
            return value
        try:
            return HubName.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return cached_names(incomplete)


hub_name = _HubName()
