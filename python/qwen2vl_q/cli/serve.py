"""qwen2vl-q serve: an HTTP server."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.device import device_option, print_note
from qwen2vl_q.cli.model_file import model_file, tower_file, tower_of
from qwen2vl_q.cli.options import COUNT, SECONDS, lora_option
from qwen2vl_q.cli.output import say
from qwen2vl_q.serve.limits import Limits

if TYPE_CHECKING:
    from qwen2vl_q.serve.app import Settings

_KEY = "QWEN2VL_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST_KEY = 8  # characters

# Fields of Limits.
_LIMITS = {
    "max_body_bytes": ("body_bytes", "Bytes of a request's body."),
    "max_images": ("images", "Pictures, clips and single frames of a request."),
    "max_pixels": ("pixels", "Pixels of a picture before it is decoded."),
    "max_video_seconds": ("video_seconds", "Seconds that a clip may take to be decoded."),
    "max_visual_tokens": ("visual_tokens", "Tokens that a request's pictures and clips may take."),
    "max_prompt_tokens": ("prompt_tokens", "Tokens of a prompt."),
    "max_output_tokens": ("output_tokens", "Tokens that a request may ask for."),
    "max_answers": ("answers", "Answers that are computed together."),
    "max_queued": ("queued", "Requests that wait; more are told to come again."),
    "max_queue_bytes": ("queue_bytes", "Bytes of all bodies that are held."),
    "max_seconds": ("seconds", "Seconds of a request, its waiting included."),
    "stop_seconds": ("stop_seconds", "Seconds that requests may go on after Ctrl-C or SIGTERM."),
}


def _limit_options(command: Any) -> Any:
    for name, (field, text) in reversed(_LIMITS.items()):
        default = getattr(Limits(), field)
        kind: Any = SECONDS if isinstance(default, float) else COUNT
        shown = f"{text}  [default: {default:,}]".replace(".0]", "]")
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, name, type=kind, metavar="N", default=default, help=shown)(command)
    return command


@click.command(short_help="Answer over HTTP: an OpenAI-compatible API and a page for browsers.")
@click.option(
    "-m",
    "--model",
    type=model_file,
    metavar="M",
    help="The model: a GGUF file, a name of the Hugging Face hub (qwen2vl-q pull --help), or demo: the "
    "packaged one, which knows drawn cards alone.  [default: demo]",
)
@click.option("--mmproj", type=tower_file, metavar="FILE", help="The vision tower, where M does not hold it.")
@click.option("--no-mmproj", is_flag=True, help="Do not look for one: text alone.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."
)
@click.option("--alias", metavar="NAME", help="The model's name for clients.  [default: its file's]")
@click.option(
    "--api-key", "keys", multiple=True, metavar="KEY", help=f"A key that clients give; also {_KEY}."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Keys, one a line.",
)
@click.option(
    "--allow-url", "urls", multiple=True, metavar="HOST", help="Fetch pictures from there; *.HOST too."
)
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="A name that requests may be sent to."
)
@click.option(
    "--allow-origin", "origins", multiple=True, metavar="ORIGIN", help="A page elsewhere that may ask."
)
@click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="[default: the physical cores allowed]"
)
@click.option("--ctx", type=COUNT, metavar="N", help="Tokens of context.  [default: 32768 at most]")
@click.option(
    "--cache-bytes", type=COUNT, metavar="N", help="Of the KV cache.  [default: 1 GiB, or a context]"
)
@device_option
@lora_option("to compute beside the weights")
@click.option("--log-json", is_flag=True, help="Lines of the log as JSON.")
@_limit_options
def serve(**options: Any) -> None:
    """Serve a model over HTTP: /v1/chat/completions as the OpenAI API has it, and a page for browsers at /.

    A line a request goes to stderr, without what it said. Ctrl-C or SIGTERM lets requests under way end.
    There is no TLS: put a proxy (nginx, Caddy) before it where it leaves this machine.

    \b
    Examples:
      qwen2vl-q serve                                             # the packaged model, http://127.0.0.1:8080
      qwen2vl-q serve -m qwen2vl-2b-q4.gguf --port 9000
      QWEN2VL_API_KEY=... qwen2vl-q serve -m m.gguf --host 0.0.0.0
      qwen2vl-q serve -m m.gguf --allow-url upload.wikimedia.org
    """
    if options["mmproj"] and options["no_mmproj"]:
        raise click.UsageError("--mmproj and --no-mmproj exclude each other")
    try:
        import uvicorn

        from qwen2vl_q.serve.app import make_app
    except ImportError as error:
        raise click.ClickException(
            f"serve needs packages that are not installed ({error.name}): pip install 'qwen2vl-q[serve]'"
        ) from None
    keys = _keys(options)
    if options["host"] not in _LOOPBACK and not keys:
        say("note: anybody who reaches this address may ask; --api-key wants a key")
    listening = _listen(options["host"], options["port"])
    file, model = _load(options)
    app = make_app(model, _settings(options, file, keys))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"{model!r}: http://{shown}:{port}/ and http://{shown}:{port}/v1")
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options["stop_seconds"])),
    )
    uvicorn.Server(config).run(sockets=[listening])


def _keys(options: dict[str, Any]) -> list[str]:
    keys = [*options["keys"]]
    if file := options["api_key_file"]:
        keys += [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        if not keys:
            raise click.ClickException(f"{file}: expected keys, one a line")
    if key := os.environ.get(_KEY):
        keys.append(key)
    if any(len(key) < _SHORTEST_KEY or not key.isprintable() or " " in key for key in keys):
        raise click.ClickException(f"a key: expected {_SHORTEST_KEY} characters or more, without spaces")
    return keys


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, so that an address in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise click.ClickException(f"{printable(host)}:{port}: {reason}") from None


def _load(options: dict[str, Any]) -> tuple[str, Any]:
    from qwen2vl_q.cli.progress import StageBars
    from qwen2vl_q.model import Qwen2VL

    file = options["model"]
    if file is None:
        say("note: this is the packaged demo model, which knows drawn cards alone; -m M.gguf serves another")
        file = model_file("demo")
    with StageBars() as bars:
        model = Qwen2VL.from_gguf(
            file,
            options["threads"],
            options["ctx"],
            mmproj=False if options["no_mmproj"] else options["mmproj"] or tower_of(file),
            device=options["device"],
            cache_bytes=options["cache_bytes"],
            lora=options["lora"],
            progress=bars,
        )
    print_note(model.note)
    return file, model


def _settings(options: dict[str, Any], file: str, keys: list[str]) -> Settings:
    from qwen2vl_q.serve import log
    from qwen2vl_q.serve.app import Settings
    from qwen2vl_q.vision.fetch import Fetcher

    limits = Limits(**{field: options[name] for name, (field, _) in _LIMITS.items()})
    local = options["host"] in _LOOPBACK
    return Settings(
        name=options["alias"] or Path(file).stem,
        limits=limits,
        keys=keys,
        hosts=options["hosts"] if local or options["hosts"] else None,
        origins=options["origins"],
        fetcher=Fetcher(frozenset(options["urls"])) if options["urls"] else None,
        log_line=log.as_json if options["log_json"] else log.as_text,
        write=_write,
    )


def _write(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
