"""qwen2vl-q convert: a Hugging Face checkpoint, or other GGUF files, become one GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from qwen2vl_q.cli.converting import convert_model
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.cli.writing import gguf_path, notes_console, require_new
from qwen2vl_q.convert import FILE_TYPES, FileType, Recipe
from qwen2vl_q.convert.files import download, is_hub_id


@click.command(short_help="Convert a checkpoint, or GGUF files of other types, to one file.")
@click.argument("source", metavar="SRC")
@click.argument(
    "out", metavar="OUT.gguf", type=click.Path(dir_okay=False, path_type=Path), callback=gguf_path
)
@click.option(
    "--type",
    "type_",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    default="q4_0",
    show_default=True,
    help="Of the weights.",
)
@click.option(
    "--vision-type",
    type=click.Choice(FILE_TYPES, case_sensitive=False),
    help="Of the vision tower's weights.  [default: q8_0 in q4_0 files, else as --type]",
)
@click.option(
    "--mmproj",
    type=model_file,
    metavar="FILE",
    help="The vision tower of SRC.gguf, where it has none.  [default: the one beside it]",
)
@click.option("--name", help="The model's name in the file.  [default: from SRC]")
@click.option("--force", is_flag=True, help="Overwrite OUT.gguf where it exists.")
def convert(
    source: str,
    out: Path,
    type_: FileType,
    vision_type: FileType | None,
    mmproj: str | None,
    name: str | None,
    force: bool,
) -> None:
    """Convert a Qwen2-VL checkpoint, or GGUF files of other types, to one GGUF file.

    SRC is a folder as the Hugging Face hub has it (config.json, safetensors, tokenizer), or the name of a
    model there, which is then downloaded into the hub's cache; or a GGUF file, with its vision tower inside
    or beside it (--mmproj), whose vocabulary, template and other keys stay. OUT.gguf holds the language
    model, the vision tower, the tokenizer, the chat template, and the limits and defaults of both.

    Norms and biases stay F32. In q4_0 files the embeddings and the head are Q6_K, the vision tower Q8_0. A
    matrix whose rows a type's blocks do not divide gets a wider type; the table at the end says which.

    \b
    Examples:
      qwen2vl-q convert Qwen/Qwen2-VL-2B-Instruct qwen2-vl-2b.gguf
      qwen2vl-q convert ./my-finetune my-finetune-q8_0.gguf --type q8_0
      qwen2vl-q convert ./my-finetune m.gguf --type q4_0 --vision-type f16 --force
      qwen2vl-q convert Qwen2-VL-2B-Instruct-f16.gguf q8.gguf --mmproj mmproj-f16.gguf --type q8_0
    """
    if not force:
        require_new(out)  # before a download, not after
    recipe = Recipe(type_, vision_type)
    if is_hub_id(source) and mmproj is None:
        notes_console().print(f"No folder '{source}' here: fetching it from the Hugging Face hub")
        name = name or source.rsplit("/", 1)[1].replace("-", " ")
        source = str(download(source))
    convert_model(source, mmproj, out, recipe, name, force)
