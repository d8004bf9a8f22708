"""qwen2vl-q chat: one question, or a conversation."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.cli.device import device_option, print_note
from qwen2vl_q.cli.model_file import model_file, tower_file, tower_of
from qwen2vl_q.cli.options import COUNT, lora_option
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.pictures import clip_file, is_clip, picture_file, typed_clip, typed_pictures
from qwen2vl_q.cli.setting_options import setting_options
from qwen2vl_q.cli.turn import answer, show, show_clip

if TYPE_CHECKING:
    from qwen2vl_q.cli.conversation import Conversation

_DEMO_NOTE = (
    "note: this is the packaged demo model, which knows nothing but drawn cards (qwen2vl-q demo draws one); "
    "-m M.gguf asks another (qwen2vl-q convert makes the file)"
)


@click.command(short_help="Ask a model about pictures: one question, or a conversation.")
@click.option(
    "-m",
    "--model",
    type=model_file,
    metavar="M",
    help="The model: a GGUF file, a name of the Hugging Face hub (qwen2vl-q pull --help), or demo: the "
    "packaged one, which knows drawn cards alone.  [default: demo]",
)
@click.option(
    "--mmproj",
    type=tower_file,
    metavar="FILE",
    help="The vision tower, where the model's file does not hold it.  [default: mmproj*.gguf beside it ...]",
)
@click.option("--no-mmproj", is_flag=True, help="Do not look for one: text alone.")
@click.option(
    "--image",
    "images",
    type=picture_file,
    multiple=True,
    metavar="FILE",
    help="A picture, an http(s) address, pages of a document (doc.pdf#3-5); - reads stdin. May be repeated.",
)
@click.option(
    "--video",
    "videos",
    type=clip_file,
    multiple=True,
    metavar="FILE",
    help="A clip, or a part of it (clip.mp4#t=10,25: seconds); a GIF or WebP, too. May be repeated.",
)
@click.option("-p", "--prompt", help="Ask this, print the answer and exit; - reads it from stdin.")
@click.option("--system", help="The system prompt.  [default: the template's]")
@setting_options
@click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: the physical cores allowed]"
)
@click.option("--ctx", type=COUNT, metavar="N", help="Tokens of context.  [default: 32768 at most]")
@click.option(
    "--precision",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    show_default=True,
    help="exact: float32 throughout.",
)
@device_option
@lora_option("to compute beside the weights")
@click.option("--stats", "show_stats", is_flag=True, help="Print times and memory on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Print what was loaded on stderr.")
def chat(**options: Any) -> None:
    """Ask a Qwen2-VL model about pictures.

    With -p, prints one answer and exits. Without, holds a conversation: /help lists what can be typed. Where
    stdin is not a terminal, each of its lines is a question.

    \b
    Examples:
      qwen2vl-q chat --image card-0.png -p "What is in the picture?"      # the packaged model
      qwen2vl-q chat -m m.gguf --image photo.jpg -p "What is in this picture?"
      qwen2vl-q chat -m Qwen2-VL-2B-Instruct-Q4_K_M.gguf --mmproj mmproj-Qwen2-VL-2B-Instruct-f16.gguf
      qwen2vl-q chat -m Qwen/Qwen2-VL-2B-Instruct --image photo.jpg       # fetched from the hub, once
      qwen2vl-q chat -m m.gguf --image page1.png --image page2.png --stats
      qwen2vl-q chat -m m.gguf --image report.pdf#3-5 -p "What changed?"  # pages of a PDF or a TIFF
      qwen2vl-q chat -m m.gguf --video clip.mp4#t=10,25 -p "What happens?"
      qwen2vl-q chat -m m.gguf --lora ./adapter --lora ./another:0.5
      cat question.txt | qwen2vl-q chat -m m.gguf -p -
      curl https://example.org/photo.jpg | qwen2vl-q chat -m m.gguf --image - -p "What is this?"
    """
    _require_one_reader_of_stdin(options)
    question = options["prompt"]
    if question == "-":
        question = sys.stdin.read().rstrip("\n")
    if question is not None and not question.strip():
        raise click.UsageError("the prompt is empty")
    if options["mmproj"] and options["no_mmproj"]:
        raise click.UsageError("--mmproj and --no-mmproj exclude each other")
    if options["mmproj"] and not options["model"]:
        raise click.UsageError("--mmproj is half of a model: name the other with -m")
    conversation = _start(options)
    if question is None:
        from qwen2vl_q.cli.repl import converse

        if not converse(conversation, options["show_stats"]):
            raise click.exceptions.Exit(1)
        return
    answer(conversation, question)
    if options["show_stats"]:
        say(conversation.stats())


def _require_one_reader_of_stdin(options: dict[str, Any]) -> None:
    kind = next((kind for kind in ("image", "video") if "-" in options[f"{kind}s"]), None)
    if kind is None:
        return
    if options["prompt"] is None:
        raise click.UsageError(f"--{kind} - takes stdin, which a conversation's lines come from: ask with -p")
    if [*options["images"], *options["videos"], options["prompt"]].count("-") > 1:
        raise click.UsageError("only one of --image, --video and -p may be -: stdin is read once")


def _start(options: dict[str, Any]) -> Conversation:
    """Loads the model and the pictures."""
    from qwen2vl_q.cli.conversation import Conversation
    from qwen2vl_q.cli.progress import StageBars
    from qwen2vl_q.cli.settings import Settings
    from qwen2vl_q.model import Qwen2VL

    images = [name for name in options["images"] if not is_clip(name)]
    videos = [*(name for name in options["images"] if is_clip(name)), *options["videos"]]
    pictures = [found for name in images for found in typed_pictures(name)]
    clips = [(name, typed_clip(name, options["fps"], options["max_frames"])) for name in videos]
    file = options["model"]
    if file is None:
        say(_DEMO_NOTE)
        file = model_file("demo")
    with StageBars() as bars:
        model = Qwen2VL.from_gguf(
            file,
            options["threads"],
            options["ctx"],
            options["precision"],
            mmproj=False if options["no_mmproj"] else options["mmproj"] or tower_of(file),
            device=options["device"],
            lora=options["lora"],
            progress=bars,
        )
    if model.mmproj and not options["mmproj"]:
        say(f"vision tower: {model.mmproj}")
    print_note(model.note)
    if options["verbose"]:
        say(f"{file}: {model!r}, weights {model.weight_bytes / 1e9:.2f} GB")
    settings = Settings(**{field.name: options[field.name] for field in fields(Settings)})
    conversation = Conversation(model, options["system"], settings)
    for name, picture in pictures:
        show(conversation, name, picture, "--vision-tokens 0", tell=options["verbose"])
    for name, clip in clips:
        show_clip(conversation, name, clip)
    return conversation
