"""qwen2vl-q ground: where things are in a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.device import device_option, print_note
from qwen2vl_q.cli.model_file import model_file, tower_file, tower_of
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.pictures import picture_file, typed_picture


def _output(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise click.BadParameter(f"'{value}' does not end in .png, .jpg or .webp")
    return value


@click.command(short_help="Find things in a picture: boxes, drawn or as numbers.")
@click.argument("image", metavar="IMAGE", type=picture_file)
@click.argument("phrases", metavar="PHRASE...", nargs=-1, required=True)
@click.option("-m", "--model", type=model_file, metavar="M", help="As of chat.  [default: demo]")
@click.option("--mmproj", type=tower_file, metavar="FILE", help="The vision tower, where M does not hold it.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_output,
    help="Draw the boxes over the picture into this file (.png, .jpg, .webp).",
)
@click.option("--question", metavar="TEXT", help="With {} for the phrase.  [default: Give the box of {}.]")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print the regions as JSON.")
@click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: the physical cores allowed]"
)
@device_option
def ground(image: str, phrases: tuple[str, ...], output: Path | None, as_json: bool, **options: Any) -> None:
    """Find things in a picture. Prints a line a region: its label and left, top, right and bottom, in pixels
    of the picture as it stands upright; a point has two numbers. - reads the picture from stdin.

    The exit code is 1 where nothing was found.

    \b
    Examples:
      qwen2vl-q ground card-0.png "the purple triangle" -o found.png      # the packaged model
      qwen2vl-q ground -m m.gguf photo.jpg "the red car" "the dog" --json
      qwen2vl-q ground -m m.gguf screen.png "Send" --question "Where is the button {}?"
    """
    from qwen2vl_q.chat.grounding import Region
    from qwen2vl_q.cli.progress import StageBars
    from qwen2vl_q.engine.chats import GROUND
    from qwen2vl_q.model import Qwen2VL
    from qwen2vl_q.vision.image_processor import load_image

    if output is not None and output.exists() and not options["force"]:
        raise click.UsageError(f"{output} exists: pass --force to overwrite it")
    picture = load_image(typed_picture(image))
    file: Any = options["model"] or model_file("demo")
    with StageBars() as bars:
        tower = options["mmproj"] or tower_of(file)
        model = Qwen2VL.from_gguf(
            file, options["threads"], mmproj=tower, device=options["device"], progress=bars
        )
    print_note(model.note)
    found: list[Region] = []
    for phrase in phrases:
        with StageBars() as bars:
            regions = model.ground(picture, phrase, question=options["question"] or GROUND, progress=bars)
        if not regions:
            say(f"{phrase}: not found")
        found += [Region(region.label or phrase, region.points) for region in regions]
    if output is not None:
        _draw(output, picture, found, options["force"])
    if as_json:
        click.echo(json.dumps([_described(region) for region in found], ensure_ascii=False, indent=2))
    else:
        for region in found:
            numbers = " ".join(f"{number:.0f}" for point in region.points for number in point)
            click.echo(f"{printable(region.label)}: {numbers}")
    if not found:
        raise click.exceptions.Exit(1)


def _described(region: Any) -> dict[str, Any]:
    numbers = [round(number, 1) for point in region.points for number in point]
    return {"label": region.label, "point" if region.is_point else "box": numbers}


def _draw(output: Path, picture: Any, regions: Any, force: bool) -> None:
    from qwen2vl_q.base.atomic_file import whole_or_not_at_all
    from qwen2vl_q.vision.drawing import draw_regions

    encoded = io.BytesIO()
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(output.suffix.lower(), "PNG")
    draw_regions(picture, [(region.label, region.box) for region in regions]).save(encoded, kind, quality=92)
    with whole_or_not_at_all(output, force) as part:
        part.write_bytes(encoded.getvalue())
