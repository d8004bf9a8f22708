"""qwen2vl-q pull: a model of the hub comes into the cache."""

from __future__ import annotations

import click

from qwen2vl_q.cli.hub_name import hub_name
from qwen2vl_q.cli.interruption import ended_by_signal
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.progress import StageBars
from qwen2vl_q.hub.names import HubName


@click.command(short_help="Fetch a model of the Hugging Face hub, or a newer version of it.")
@click.argument("name", metavar="NAME", type=hub_name)
def pull(name: HubName) -> None:
    """Fetch a model of the Hugging Face hub: owner/name[:TYPE][@REVISION].

    Of a repository with GGUF files, TYPE and the vision tower beside it are fetched. Without TYPE: Q4_K_M,
    else Q4_0, else Q8_0, else the smallest file of 4 bits and more, else the largest. Of several files of a
    type, TYPE may be a file's name. A checkpoint in safetensors is fetched, and converted to TYPE (Q4_0)
    once. Every command does all this for a name after -m that is not in the cache; pull asks the hub for a
    newer version, too.

    The file's path goes to stdout, and after it the vision tower's where it has a file of its own. Downloads
    lie in the hub's cache (HF_HOME), converted files in QWEN2VL_CACHE or the platform's folder for caches.
    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count.

    \b
    Examples:
      qwen2vl-q pull Qwen/Qwen2-VL-2B-Instruct
      qwen2vl-q pull Qwen/Qwen2-VL-2B-Instruct:q8_0@main
      qwen2vl-q pull bartowski/Qwen2-VL-7B-Instruct-GGUF:Q5_K_M
    """
    from qwen2vl_q.hub.models import Models

    with ended_by_signal(f"{name} is not fetched"), StageBars() as bars:
        entry = Models(tell=say, progress=bars).pull(name)
    for path in (entry.model, entry.mmproj):
        if path is not None:
            click.echo(path)
