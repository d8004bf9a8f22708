"""qwen2vl-q demo: the packaged model looks at a card that it has never seen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.device import computing_on, device_option, print_note
from qwen2vl_q.cli.options import SEED
from qwen2vl_q.cli.output import say

if TYPE_CHECKING:
    from qwen2vl_q.demo.cards import Thing
    from qwen2vl_q.engine.stats import GenerationStats


def _png_path(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() != ".png":
        raise click.BadParameter(f"'{value}' does not end in .png")
    return value


@click.command(short_help="Draw a card and ask the packaged model about it.")
@click.option(
    "-o",
    "--output",
    metavar="FILE.png",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_png_path,
    help="Where the card goes.  [default: card-N.png, N from --seed]",
)
@click.option("--seed", type=SEED, metavar="N", default=0, help="Which card.  [default: 0]")
@click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: the physical cores allowed]"
)
@device_option
@click.option("--force", is_flag=True, help="Overwrite a FILE.png that holds something else.")
def demo(output: Path | None, seed: int, threads: int | None, device: str, force: bool) -> None:
    """Draw a card, save it, and ask the packaged model about it: its answers beside the truth.

    The model has 8 million parameters and knows nothing but such cards. It was not trained on this very one,
    and may be wrong. Times go to stderr.

    \b
    Examples:
      qwen2vl-q demo
      qwen2vl-q demo --seed 7 -o /tmp/card.png
      qwen2vl-q chat --image card-0.png -p "What is in the picture?"    # the same model, your question
    """
    from qwen2vl_q import DEMO_MODEL
    from qwen2vl_q.cli.conversation import Conversation
    from qwen2vl_q.cli.settings import Settings
    from qwen2vl_q.cli.turn import answer
    from qwen2vl_q.demo import cards
    from qwen2vl_q.model import Qwen2VL

    card, things = cards.example(seed)
    png = io.BytesIO()
    card.save(png, "PNG")
    path = output or Path(f"card-{seed}.png")
    _save(path, png.getvalue(), force)
    click.echo(f"{printable(str(path))}: {card.width} x {card.height} pixels")

    model = Qwen2VL.from_gguf(DEMO_MODEL, threads, device=device)
    print_note(model.note)
    conversation = Conversation(model, None, Settings(temperature=0, max_new_tokens=64))
    taken = []
    for talk in _talks(things):
        conversation.clear()
        conversation.attach(str(path))
        for question, truth in talk:
            click.echo(f"\n{question}")
            answer(conversation, question, prefix="  answer  ")
            click.echo(f"  truth   {truth}")
            taken.append(model.last_stats)
    click.echo(err=True)
    say(f"{_describe(taken)} ({computing_on(model.isa, model.n_threads)})")


def _talks(things: Sequence[Thing]) -> list[list[tuple[str, str]]]:
    """Conversations about a card: questions, each with its right answer."""
    from qwen2vl_q.demo.cards import article, listing

    everything = listing([article(thing.full_name) for thing in things])
    first = things[0]
    return [
        [
            ("What is in the picture?", f"A{everything[1:]}."),
            ("How many shapes are there?", f"{len(things)} shapes."),
        ],
        [(f"What colour is the {first.name}?", f"{first.colour.capitalize()}.")],
    ]


def _save(path: Path, png: bytes, force: bool) -> None:
    """Writes the card, unless it is there already."""
    from qwen2vl_q.base.atomic_file import whole_or_not_at_all

    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder '{path.absolute().parent}'")
    if path.exists() and not force:
        if path.read_bytes() == png:
            return
        raise click.UsageError(f"{path} exists: pass --force to overwrite it")
    with whole_or_not_at_all(path, force) as part:
        part.write_bytes(png)


def _describe(taken: Sequence[GenerationStats]) -> str:
    """`taken`: of the questions in turn; the first has seen the card, the others found it in the cache."""
    looking, *later = taken
    first = looking.encode_seconds + looking.prefill_seconds
    again = max(stats.encode_seconds + stats.prefill_seconds for stats in later)
    tokens = sum(stats.generated_tokens - 1 for stats in taken)
    rate = tokens / sum(stats.decode_seconds for stats in taken)
    return (
        f"First token: {first * 1e3:.1f} ms with the card ({looking.image_tokens} tokens), "
        f"{again * 1e3:.1f} ms once it is in the cache; {rate:.0f} tokens/s"
    )
