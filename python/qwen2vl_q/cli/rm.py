"""qwen2vl-q rm: models leave the cache."""

from __future__ import annotations

import sys

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.hub_name import hub_name
from qwen2vl_q.cli.output import say
from qwen2vl_q.hub.names import HubName


@click.command(short_help="Remove a model that has been fetched or converted by name.")
@click.argument("name", metavar="NAME", type=hub_name)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name: HubName, yes: bool) -> None:
    """Remove a model that has been fetched or converted by name: owner/name[:TYPE][@REVISION].

    Without TYPE or @REVISION all of the name go: the file that was converted, and what was downloaded, from
    the hub's cache, where other programs may share it; not what another model of `list` is read from. Asks
    first.

    \b
    Examples:
      qwen2vl-q rm Qwen/Qwen2-VL-2B-Instruct
      qwen2vl-q rm Qwen/Qwen2-VL-2B-Instruct:Q8_0 --yes
    """
    from qwen2vl_q.hub.disk import size_text
    from qwen2vl_q.hub.models import Models

    models = Models(tell=say)
    entries = models.cache.entries()
    going = [entry for entry in entries if entry.is_of(name)]
    if not going:
        there = ", ".join(str(entry.name) for entry in entries) or "nothing"
        raise click.ClickException(f"{name} is not in the cache; it has {printable(there, 1000)}")
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("there is nobody to ask: pass --yes")
        for path, size in models.files_of(going).items():
            click.echo(f"{printable(str(path), 1000)}  {size_text(size)}", err=True)
        click.confirm("Remove these?", abort=True, err=True)
    models.remove(going)
    for entry in going:
        click.echo(f"removed {entry.name}")
