"""qwen2vl-q merge: a language model's file and its vision tower's become one."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.cli.writing import gguf_path, notes_console, require_new, writing
from qwen2vl_q.convert import merge_models


@click.command(short_help="Merge a pair of files, as llama.cpp has them, into one.")
@click.argument("model", metavar="M.gguf", type=model_file)
@click.argument("mmproj", metavar="MMPROJ.gguf", type=model_file)
@click.argument(
    "out", metavar="OUT.gguf", type=click.Path(dir_okay=False, path_type=Path), callback=gguf_path
)
@click.option("--force", is_flag=True, help="Overwrite OUT.gguf where it exists.")
def merge(model: str, mmproj: str, out: Path, force: bool) -> None:
    """Merge a language model's file and its vision tower's (mmproj) into one.

    The weights stay as they are, bit for bit; qwen2vl-q convert takes a pair, too, and makes other types of
    it. A pair that qwen2vl-q split has made becomes the file that it was.

    \b
    Examples:
      qwen2vl-q merge Qwen2-VL-2B-Instruct-Q4_K_M.gguf mmproj-Qwen2-VL-2B-Instruct-f16.gguf qwen2-vl-2b.gguf
      qwen2vl-q merge big-00001-of-00003.gguf mmproj-big.gguf big.gguf        # three parts and a tower
    """
    if not force:
        require_new(out)
    with writing(notes_console(), out) as progress:
        n_bytes = merge_models(Path(model), Path(mmproj), out, force, progress)
    click.echo(f"{printable(str(out))}: {n_bytes:,} bytes")
