"""qwen2vl-q video: videos that are longer than a context."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.device import device_option, print_note
from qwen2vl_q.cli.model_file import model_file, tower_file, tower_of
from qwen2vl_q.cli.options import COUNT, FPS, FiniteRange
from qwen2vl_q.cli.output import harmless, say
from qwen2vl_q.cli.pictures import picture_file

if TYPE_CHECKING:
    from qwen2vl_q.tasks.long_video import Part


@click.command(short_help="Watch a video of any length: a timeline, a summary, answers.")
@click.argument("video", metavar="FILE", type=picture_file)
@click.option("-m", "--model", type=model_file, metavar="M", help="As of chat.  [default: demo]")
@click.option("--mmproj", type=tower_file, metavar="FILE", help="The vision tower, where M does not hold it.")
@click.option("-p", "--prompt", help="Answer this, with another look at the parts that matter.")
@click.option(
    "--part",
    "part_seconds",
    type=FiniteRange(1, 3600),
    metavar="SECONDS",
    default=30.0,
    show_default=True,
    help="About how long a part is.",
)
@click.option(
    "--vision-tokens", type=COUNT, metavar="N", default=2560, show_default=True, help="Of a part, at most."
)
@click.option("--fps", type=FPS, metavar="X", help="Frames a second that are shown.  [default: 2]")
@click.option("--describe", metavar="TEXT", help="Ask this of each part.  [default: what happens]")
@click.option(
    "--notes",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.json",
    help="Where notes are kept.  [default: the cache's folder]",
)
@click.option("--afresh", is_flag=True, help="Forget notes that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: the physical cores allowed]"
)
@device_option
def video(video: str, as_json: bool, **options: Any) -> None:
    """Watch a video of any length, part by part. Prints a line a part as it comes, a summary, and the answer.

    Notes are kept: a run that was cut goes on where it was, and another question about the same video, asked
    the same way, is answered from them at once.

    \b
    Examples:
      qwen2vl-q video -m m.gguf lecture.mp4
      qwen2vl-q video -m m.gguf lecture.mp4 -p "When is the exam?"
      qwen2vl-q video -m m.gguf door.mkv --part 10 --describe "Who comes in? Answer: nobody, or who." --json
    """
    from qwen2vl_q.cli.progress import StageBars
    from qwen2vl_q.model import Qwen2VL

    file: Any = options["model"] or model_file("demo")
    notes = options["notes"] or _kept_notes(video, str(file), options)
    if options["afresh"]:
        notes.unlink(missing_ok=True)
    notes.parent.mkdir(parents=True, exist_ok=True)
    with StageBars() as bars:
        tower = options["mmproj"] or tower_of(file)
        model = Qwen2VL.from_gguf(
            file, options["threads"], mmproj=tower, device=options["device"], progress=bars
        )
    print_note(model.note)

    shown = harmless if sys.stdout.isatty() else str

    def show(part: Part) -> None:
        if not as_json:
            click.echo(f"{part.times}  {printable(part.text, 10_000)}")

    with StageBars() as bars, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = model.video(
            video,
            options["prompt"],
            part_seconds=options["part_seconds"],
            part_tokens=options["vision_tokens"],
            describe=options["describe"],
            fps=options["fps"],
            notes=notes,
            on_part=show,
            progress=bars,
        )
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        say(f"warning: {message}")
    if as_json:
        click.echo(json.dumps(asdict(found), ensure_ascii=False, indent=2))
        return
    if len(found.parts) > 1:
        click.echo(f"\nSummary: {shown(found.summary)}")
    if found.answer:
        click.echo(f"\n{shown(found.answer)}")
        say(f"seen again: {', '.join(found.parts[i].times for i in found.looked_at)}", dim=True)


def _kept_notes(video: str, model: str, options: dict[str, Any]) -> Path:
    from qwen2vl_q.hub.cache import default_folder

    asked = (str(Path(video).absolute()), model, *(options[k] for k in _ASKED))
    digest = hashlib.blake2b(repr(asked).encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
    return default_folder() / "video" / f"{Path(video).stem[:40]}-{digest}.json"


_ASKED = ("part_seconds", "vision_tokens", "fps", "describe")
