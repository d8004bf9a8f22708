"""qwen2vl-q convert: a Hugging Face checkpoint, or other GGUF files, become one GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.converting import convert_model, force_option, mmproj_option, out_argument
from qwen2vl_q.cli.options import lora_option
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.writing import require_new
from qwen2vl_q.convert import FILE_TYPES, Adapter, FileType, Recipe, default_recipe
from qwen2vl_q.hub.models import Models
from qwen2vl_q.hub.names import HubName


@click.command(short_help="Convert a checkpoint, or GGUF files of other types, to one file.")
@click.argument("source", metavar="SRC")
@out_argument
@click.option(
    "--type",
    "type_",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    help="Of the weights.  [default: q4_0; of quantized checkpoints the one that keeps their integers]",
)
@click.option(
    "--vision-type",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    help="Of the vision tower's weights.  [default: q8_0 in q4_0 files, else as --type]",
)
@lora_option("to merge")
@mmproj_option("SRC.gguf")
@click.option("--name", help="The model's name in the file.  [default: from SRC]")
@force_option
def convert(
    source: str,
    out: Path,
    type_: FileType | None,
    vision_type: FileType | None,
    lora: list[tuple[Path, float]],
    mmproj: str | None,
    name: str | None,
    force: bool,
) -> None:
    """Convert a Qwen2-VL checkpoint, or GGUF files of other types, to one GGUF file.

    SRC is a folder as the Hugging Face hub has it (config.json, safetensors, tokenizer), or the name of a
    model there, owner/name[@REVISION], which is then downloaded into the hub's cache; or a GGUF file, with
    its vision tower inside or beside it (--mmproj), whose vocabulary, template and other keys stay. OUT.gguf
    holds the language model, the vision tower, the tokenizer, the chat template, and the limits and defaults
    of both.

    Norms and biases stay F32. In q4_0 files the head is Q6_K (embeddings that are the head, too), the vision
    tower Q8_0. A matrix whose rows a type's blocks do not divide gets a wider type; the table at the end says
    which.

    Of GPTQ and AWQ checkpoints the integers are kept as they are, in Q4_0, Q5_0 or Q8_0, unless --type asks
    for another type; where they cannot be (act-order, bitsandbytes in 4 bits), matrices become Q8_0. Notes at
    the end say what was done and what it cost.

    \b
    Examples:
      qwen2vl-q convert Qwen/Qwen2-VL-2B-Instruct qwen2-vl-2b.gguf
      qwen2vl-q convert ./my-finetune my-finetune-q8_0.gguf --type q8_0
      qwen2vl-q convert ./my-finetune m.gguf --type q4_0 --vision-type f16 --force
      qwen2vl-q convert ./base m.gguf --lora ./adapter --lora ./another:0.5
      qwen2vl-q convert Qwen2-VL-2B-Instruct-f16.gguf q8.gguf --mmproj mmproj-f16.gguf --type q8_0
    """
    if not force:
        require_new(out)  # before a download, not after
    is_gguf = Path(source).suffix.lower() == ".gguf"
    if is_gguf and lora:
        raise click.UsageError("--lora: adapters are merged into checkpoints, not into GGUF files")
    if not is_gguf and mmproj is None and not Path(source).exists() and HubName.reads_as(source):
        asked = HubName.parse(source)
        if asked.type:
            raise click.UsageError(f"SRC: the type of OUT.gguf is --type's, found {printable(source)}")
        source, name = str(Models(tell=say).checkpoint(asked)), name or asked.title
    if type_ or not Path(source).is_dir():
        recipe = Recipe(type_ or "q4_0", vision_type)
    else:
        recipe = default_recipe(Path(source), vision_type)
    merged = [Adapter(path, scale) for path, scale in lora]
    convert_model(source, mmproj, out, recipe, name, force, adapters=merged)
