"""qwen2vl-q quantize: a model becomes one GGUF file of other types, tensor by tensor as wished."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl_q.cli.converting import convert_model, force_option, mmproj_option, out_argument
from qwen2vl_q.cli.writing import require_new
from qwen2vl_q.convert import FILE_TYPES, FileType, Override, Recipe, read_imatrix


def _overrides(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> tuple[Override, ...]:
    try:
        return tuple(map(Override.of, values))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(short_help="Make a file of smaller types of a model.")
@click.argument("source", metavar="IN")
@out_argument
@click.option(
    "--type",
    "type_",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    required=True,
    help="Of the language model: a type, or one of llama.cpp's mixes of types.",
)
@click.option(
    "--vision-type",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    help="Of the vision tower's weights.  [default: --type where it has 16 bits or more, else q8_0]",
)
@click.option(
    "--tensor",
    "overrides",
    metavar="REGEX=TYPE",
    multiple=True,
    callback=_overrides,
    help="The type of matrices by their names in the file; the first that fits counts.",
)
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="llama.cpp's importance matrix: what the columns weigh.",
)
@mmproj_option("IN")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="[default: one for each core]")
@force_option
def quantize(
    source: str,
    out: Path,
    type_: FileType,
    vision_type: FileType | None,
    overrides: tuple[Override, ...],
    imatrix: Path | None,
    mmproj: str | None,
    threads: int,
    force: bool,
) -> None:
    """Make one GGUF file of a model, with other types of weights.

    IN is a GGUF file, in parts or not, with its vision tower inside or beside it (--mmproj), or a folder with
    a checkpoint. The types that llama-quantize gives a mix's tensors are those given here (q4_k_m: Q6_K for
    attn_v and ffn_down in half of the layers and for the head, the others Q4_K), and blocks are searched for
    the least square error. Norms and biases stay F32. Start from F16, BF16 or F32: what a quantized file has
    lost stays lost.

    \b
    Examples:
      qwen2vl-q quantize qwen2-vl-2b-f16.gguf qwen2-vl-2b-q4_k_m.gguf --type q4_k_m
      qwen2vl-q quantize ./my-finetune m.gguf --type q4_k_s --imatrix imatrix.gguf
      qwen2vl-q quantize f16.gguf m.gguf --type q4_0 --tensor 'blk\\.[01]\\.=q8_0' --tensor ffn_down=q5_0
    """
    if not force:
        require_new(out)
    recipe = Recipe(type_, vision_type, overrides, None if imatrix is None else read_imatrix(imatrix))
    convert_model(source, mmproj, out, recipe, None, force, threads)
