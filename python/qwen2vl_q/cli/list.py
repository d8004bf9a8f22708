"""qwen2vl-q list: the models that are there by name."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import click
from rich.table import Table

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.tables import stdout_console
from qwen2vl_q.hub.cache import Cache, Entry
from qwen2vl_q.hub.disk import size_text


@click.command(short_help="List the models that have been fetched or converted by name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a list with an object for each model.")
def list(as_json: bool) -> None:
    """List the models that have been fetched or converted by name: name, type, size, last use, path.

    Their names after -m need no network. Sizes are of the files that the model is read from; --json has the
    vision tower's path, the revision and the commit too.

    \b
    Examples:
      qwen2vl-q list
      qwen2vl-q list --json | jq -r '.[].path'
    """
    cache = Cache()
    entries = cache.entries()
    if as_json:
        click.echo(json.dumps([_as_dict(cache, entry) for entry in entries], indent=2))
    elif entries:
        table = Table("name", "type", box=None, header_style="bold")
        table.add_column("size", justify="right")
        table.add_column("last used")
        table.add_column("path", overflow="fold")
        for entry in entries:
            used = datetime.fromtimestamp(cache.last_used(entry)).strftime("%Y-%m-%d %H:%M")
            name = entry.repository + (f"@{entry.revision}" if entry.revision else "")
            size = size_text(entry.size)
            table.add_row(*map(printable, (name, entry.type, size, used)), printable(entry.model, 1000))
        stdout_console().print(table, markup=False, highlight=False)
    else:
        say(f"no models in {cache.folder}; qwen2vl-q pull NAME fetches one")


def _as_dict(cache: Cache, entry: Entry) -> dict[str, Any]:
    used = datetime.fromtimestamp(cache.last_used(entry), timezone.utc)
    return {
        "name": entry.repository,
        "type": entry.type,
        "revision": entry.revision,
        "commit": entry.commit,
        "converted": entry.made,
        "size": entry.size,
        "path": entry.model,
        "mmproj": entry.mmproj,
        "last_used": used.isoformat(timespec="seconds"),
    }
