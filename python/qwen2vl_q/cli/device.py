"""Which device a command computes on."""

from __future__ import annotations

import click

from qwen2vl_q.cli.output import say


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    from qwen2vl_q.engine.devices import require_name

    try:
        return require_name(value)
    except ValueError as error:
        raise click.BadParameter(str(error).removeprefix("device: ")) from None


device_option = click.option(
    "--device",
    metavar="[cpu|cuda|cuda:N|auto]",
    default="cpu",
    show_default=True,
    callback=_device,
    help="auto: cuda where it works, else cpu.",
)


def print_note(note: str) -> None:
    """A model's word to the user, on stderr."""
    if note:
        say(f"note: {note}")


def computing_on(isa: str, n_threads: int) -> str:
    """For the user: a processor's threads count, a device has none."""
    return f"{isa}, {n_threads} threads" if n_threads else isa
