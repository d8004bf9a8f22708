"""qwen2vl-q convert: a Hugging Face checkpoint, or other GGUF files, become one GGUF file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
from rich.console import Console

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.model_file import tower_file
from qwen2vl_q.cli.options import lora_option
from qwen2vl_q.cli.output import say
from qwen2vl_q.cli.tables import Totals, size_table, stdout_console
from qwen2vl_q.cli.writing import gguf_path, notes_console, require_new, writing
from qwen2vl_q.convert import (
    FILE_TYPES,
    Adapter,
    FileType,
    GgufReport,
    Recipe,
    Report,
    convert_checkpoint,
    convert_gguf,
    default_recipe,
)
from qwen2vl_q.engine.tower_file import TowerFile
from qwen2vl_q.hub.models import Models
from qwen2vl_q.hub.names import HubName


@click.command(short_help="Convert a checkpoint, or GGUF files of other types, to one file.")
@click.argument("source", metavar="SRC")
@click.argument(
    "out", metavar="OUT.gguf", type=click.Path(dir_okay=False, path_type=Path), callback=gguf_path
)
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
@click.option(
    "--mmproj",
    type=tower_file,
    metavar="FILE",
    help="The vision tower of SRC.gguf, where it has none.  [default: the one beside it]",
)
@click.option("--name", help="The model's name in the file.  [default: from SRC]")
@click.option("--force", is_flag=True, help="Overwrite OUT.gguf where it exists.")
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

    Norms and biases stay F32. In q4_0 files the embeddings and the head are Q6_K, the vision tower Q8_0. A
    matrix whose rows a type's blocks do not divide gets a wider type; the table at the end says which.

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
    notes = notes_console()
    if Path(source).suffix.lower() == ".gguf":
        if lora:
            raise click.UsageError("--lora: adapters are merged into checkpoints, not into GGUF files")
        _convert_gguf(source, mmproj, out, Recipe(type_ or "q4_0", vision_type), name, force)
        return
    if mmproj is not None:
        raise click.UsageError("--mmproj belongs to a GGUF file; a checkpoint has its vision tower")
    if not Path(source).exists() and HubName.reads_as(source):
        asked = HubName.parse(source)
        if asked.type:
            raise click.UsageError(f"SRC: the type of OUT.gguf is --type's, found {printable(source)}")
        folder, name = Models(tell=say).checkpoint(asked), name or asked.title
    elif not Path(source).is_dir():
        raise click.UsageError(f"SRC: '{printable(source)}' is not a folder")
    else:
        folder = Path(source)
    recipe = Recipe(type_, vision_type) if type_ else default_recipe(folder, vision_type)
    with writing(notes, out) as progress:
        merged = [Adapter(path, scale) for path, scale in lora]
        report = convert_checkpoint(folder, out, recipe, name, force, progress, merged)
    _print_report(stdout_console(), report)


def _convert_gguf(
    source: str, mmproj: str | None, out: Path, recipe: Recipe, name: str | None, force: bool
) -> None:
    tower = mmproj or TowerFile.find(source).path
    notes = notes_console()
    if tower is not None and mmproj is None:
        notes.print(f"vision tower: {printable(tower, 1000)}")
    with writing(notes, out) as progress:
        report = convert_gguf(
            Path(source), None if tower is None else Path(tower), out, recipe, name, force, progress
        )
    _print_report(stdout_console(), report)


def _print_report(console: Console, report: Report | GgufReport) -> None:
    path = printable(str(report.path))
    console.print(f"{path}: {report.n_bytes:,} bytes", highlight=False, markup=False)
    groups: dict[tuple[str, ...], Totals] = {}
    for tensor in report.tensors:
        group = groups.setdefault((tensor.mapped.role.value, tensor.output.type), Totals())
        group.add(tensor.output.n_elements, tensor.output.n_bytes)
    console.print(size_table(("tensors", "type"), groups))
    fallbacks = Counter(
        (t.mapped.role.value, t.mapped.target_shape[-1], t.wanted, t.output.type)
        for t in report.tensors
        if t.wanted != t.output.type
    )
    for (role, row, wanted, type), count in fallbacks.items():
        console.print(f"{type} instead of {wanted}: {count} of {role}, rows of {row}", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
