"""qwen2vl-q split: one file becomes the pair that llama.cpp loads."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.cli.writing import notes_console, require_folder, require_new, writing
from qwen2vl_q.convert import pair_paths, split_model


def _prefix(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    if value.suffix == ".gguf":
        raise click.BadParameter(
            f"'{printable(str(value))}' ends in .gguf, which is added: give what both names begin with"
        )
    require_folder(value)
    return value


@click.command(short_help="Split a model into the pair of files that llama.cpp loads.")
@click.argument("model", metavar="M.gguf", type=model_file)
@click.argument("prefix", metavar="OUT_PREFIX", type=click.Path(path_type=Path), callback=_prefix)
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def split(model: str, prefix: Path, force: bool) -> None:
    """Split a model into the pair of files that llama.cpp's programs load.

    OUT_PREFIX.gguf holds the language model, OUT_PREFIX-mmproj.gguf the vision tower. The weights stay as
    they are, bit for bit; qwen2vl-q merge makes the one file of them again. A file in parts
    (M-00001-of-00003.gguf) is one model here: name any part.

    \b
    Examples:
      qwen2vl-q split qwen2-vl-2b.gguf Qwen2-VL-2B-Instruct-Q4_0
      llama-mtmd-cli -m Qwen2-VL-2B-Instruct-Q4_0.gguf --mmproj Qwen2-VL-2B-Instruct-Q4_0-mmproj.gguf \\
        --image photo.jpg -p "What is this?"
    """
    outs = pair_paths(prefix)
    if not force:
        require_new(*outs)
    with writing(notes_console(), *outs) as progress:
        written = split_model(Path(model), prefix, force, progress)
    for out, n_bytes in written:
        click.echo(f"{printable(str(out))}: {n_bytes:,} bytes")
