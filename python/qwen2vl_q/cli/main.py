"""qwen2vl-q: the group of commands, and what every command shares: errors, exit codes, --debug."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

import click
from click.shell_completion import shell_complete

# name -> (module, help). Loaded when used: a command must not wait for the imports of another.
COMMANDS = {
    "demo": ("qwen2vl_q.cli.demo", "Draw a card and ask the packaged model about it."),
    "chat": ("qwen2vl_q.cli.chat", "Ask a model about pictures: one question, or a conversation."),
    "video": ("qwen2vl_q.cli.video", "Watch a video of any length: a timeline, a summary, answers."),
    "ground": ("qwen2vl_q.cli.ground", "Find things in a picture: boxes, drawn or as numbers."),
    "serve": ("qwen2vl_q.cli.serve", "Answer over HTTP: an OpenAI-compatible API and a page for browsers."),
    "convert": ("qwen2vl_q.cli.convert", "Convert a checkpoint, or GGUF files of other types, to one file."),
    "quantize": ("qwen2vl_q.cli.quantize", "Make a file of smaller types of a model."),
    "split": ("qwen2vl_q.cli.split", "Split a model into the pair of files that llama.cpp loads."),
    "merge": ("qwen2vl_q.cli.merge", "Merge a pair of files, as llama.cpp has them, into one."),
    "verify": ("qwen2vl_q.cli.verify", "Compare a file with another one, or with a checkpoint."),
    "inspect": ("qwen2vl_q.cli.inspect", "Show what a GGUF file holds."),
    "pull": ("qwen2vl_q.cli.pull", "Fetch a model of the Hugging Face hub, or a newer version of it."),
    "list": ("qwen2vl_q.cli.list", "List the models that have been fetched or converted by name."),
    "rm": ("qwen2vl_q.cli.rm", "Remove a model that has been fetched or converted by name."),
    "bench": ("qwen2vl_q.cli.bench", "Measure image encoding, prefill and decoding."),
    "doctor": ("qwen2vl_q.cli.doctor", "Show what this machine has, what to expect of it, what is missing."),
}
_PROGRAM = "qwen2vl-q"
_COMPLETION = "_QWEN2VL_Q_COMPLETE"  # click's name for it
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


@dataclass
class _Run:
    """What main() has to know of a run that failed, wherever it failed."""

    debug: bool = False


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            close = get_close_matches(args[0], COMMANDS, n=1)
            if not close:
                raise
            raise click.UsageError(f"{error.format_message()} Did you mean '{close[0]}'?", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.find_root().obj.debug = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=remember,
        help="Show an error's traceback.",
    )


def _show_version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from qwen2vl_q import _native
    from qwen2vl_q.measure.machine import isa_in_use

    isa, forced = isa_in_use()
    used = f"{isa}, forced by QWEN2VL_ISA" if forced else isa
    others = ", ".join(other for other in _native.supported_isas() if other != isa)
    click.echo(
        f"qwen2vl-q {_native.__version__}, instruction set {used}" + (f" (also {others})" if others else "")
    )
    for line in _device_lines():
        click.echo(line)
    ctx.exit()


def _device_lines() -> list[str]:
    """The plug-in's devices, or why it has none; nothing where it is not installed."""
    from qwen2vl_q.base.errors import DeviceError
    from qwen2vl_q.engine import devices

    if devices.cuda_plugin() is None:
        return []
    try:
        found = devices.cuda_devices()
    except DeviceError as error:
        return [f"no cuda device: {error}"]
    return [
        f"device cuda:{device.index}: {device.name}, {device.total_bytes / 1e9:.0f} GB, "
        f"compute capability {device.capability[0]}.{device.capability[1]}"
        for device in found
    ]


@click.command(
    cls=_Commands,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, the instruction set in use, and devices.",
)
def cli() -> None:
    """Qwen2-VL on ordinary hardware: pictures in, answers out.

    \b
    Examples:
      qwen2vl-q demo                                                # a first look, nothing to fetch
      qwen2vl-q chat -m Qwen/Qwen2-VL-2B-Instruct --image a.jpg     # the real weights, fetched once
      qwen2vl-q convert ./my-finetune m.gguf                        # a checkpoint of your own
      qwen2vl-q chat -m m.gguf --image photo.jpg -p "What is it?"   # one answer on stdout
      eval "$(_QWEN2VL_Q_COMPLETE=bash_source qwen2vl-q)"           # Tab completes (also: zsh, fish)
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. Errors are one line on stderr; --debug adds a traceback."""
    _replace_closed_streams()
    run = _Run()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what a terminal's encoding does not
    if instruction := os.environ.get(_COMPLETION):
        return shell_complete(cli, {"obj": run}, _PROGRAM, _COMPLETION, instruction)
    code = _exit_code(sys.argv[1:] if arguments is None else list(arguments), run)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        code = code or _report(f"stdout: {error.strerror}", run, EXIT_ERROR)
    _drop_what_cannot_be_written()
    return code


def _exit_code(arguments: list[str], run: _Run) -> int:
    try:
        with cli.make_context(_PROGRAM, arguments or ["--help"], obj=run) as context:
            cli.invoke(context)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _report(f"{error.format_message()}{hint}", run, EXIT_USAGE)
    except click.ClickException as error:
        return _report(error.format_message(), run, EXIT_ERROR)
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except Exception as error:
        from qwen2vl_q.cli.errors import describe

        return _report(describe(error), run, EXIT_ERROR)


def _replace_closed_streams() -> None:
    """A closed stdin becomes empty, a closed stdout fails when it is written, a closed stderr takes all; and
    no file that is opened later gets their numbers."""
    for name, flags, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode))


def _drop_what_cannot_be_written() -> None:
    """Python would complain at exit of what is left in the buffers of streams that nobody reads."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(message: str, run: _Run, code: int) -> int:
    if run.debug:
        import traceback

        traceback.print_exc()
    from qwen2vl_q.cli.errors import complain

    complain(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
