"""qwen2vl-q inspect: what a GGUF file holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qwen2vl_q._native import GgufFile, TensorInfo
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.cli.tables import bits_per_weight, by_type, main_type, size_table, stdout_console
from qwen2vl_q.engine.file_notes import lacks, slow

_TOKEN_TYPES = {1: "normal", 2: "unknown", 3: "control", 4: "user defined", 5: "unused", 6: "byte"}
_SHOWN_ITEMS = 8  # of a long list
_SHOWN_CHARACTERS = 100  # of a long string


@click.command(short_help="Show what a GGUF file holds.")
@click.argument("model", metavar="M", type=model_file)
@click.option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@click.option("--template", "whole_template", is_flag=True, help="Print the chat template, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(model: str, list_tensors: bool, whole_template: bool, as_json: bool) -> None:
    """Show what a GGUF file holds: architecture, sizes, types, tokenizer, template, limits and defaults; what
    it lacks, with what counts instead; and what of it will be slow on this machine.

    Any GGUF file will do: a whole model, a language model or a vision tower alone, a vocabulary. M may be a
    name of the Hugging Face hub, too; "demo" names the packaged model.

    \b
    Examples:
      qwen2vl-q inspect m.gguf
      qwen2vl-q inspect demo --tensors
      qwen2vl-q inspect hf:bartowski/Qwen2-VL-7B-Instruct-GGUF:Q4_K_M
      qwen2vl-q inspect m.gguf --json | jq '.metadata["qwen2vl.block_count"]'
    """
    file = GgufFile(model)
    metadata = file.metadata
    if whole_template:
        template = metadata.get("tokenizer.chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{model}: the file has no chat template")
        click.echo(_visible(template))
    elif as_json:
        click.echo(json.dumps(_everything(model, file, metadata), indent=2))
    else:
        _print(stdout_console(), model, file, metadata)
        if list_tensors:
            _print_tensors(stdout_console(), file.tensors)


def _everything(model: str, file: GgufFile, metadata: Mapping[str, Any]) -> dict[str, Any]:
    tensors = file.tensors
    return {
        "path": model,
        "version": file.version,
        "alignment": file.alignment,
        "parameters": sum(math.prod(t.shape) for t in tensors),
        "type": main_type(tensors),
        "bits_per_weight": bits_per_weight(tensors),
        "types": [
            {
                "type": type,
                "tensors": totals.count,
                "parameters": totals.elements,
                "bytes": totals.n_bytes,
                "bits_per_weight": totals.bits_per_weight,
            }
            for type, totals in by_type(tensors).items()
        ],
        "lacks": lacks(model, file, metadata),
        "slow": slow(tensors),
        "metadata": dict(metadata),
        "tensors": [
            {"name": t.name, "type": t.type, "shape": list(t.shape), "offset": t.offset, "bytes": t.n_bytes}
            for t in tensors
        ],
    }


def _print(console: Console, model: str, file: GgufFile, metadata: Mapping[str, Any]) -> None:
    tensors = file.tensors
    kind = f", mostly {main_type(tensors)}, {bits_per_weight(tensors):.2f} bits a weight" if tensors else ""
    console.print(
        f"[bold]{escape(_visible(model))}[/bold]: GGUF version {file.version}, {len(tensors)} tensors{kind}",
        highlight=False,
    )
    for title, rows in _sections(metadata):
        if rows:
            _print_section(console, title, rows)
    if tensors:
        console.print("\n[bold]Weights[/bold]")
        console.print(size_table(("type",), {(type,): t for type, t in by_type(tensors).items()}))
    for title, notes in (("Lacks", lacks(model, file, metadata)), ("Slow here", slow(tensors))):
        if notes:
            console.print(f"\n[bold]{title}[/bold]")
            for note in notes:
                console.print(f" {escape(note)}", highlight=False)


def _sections(metadata: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The keys under readable headings; the tokenizer's long lists are summed up."""
    headings = {"general.sampling.": "Sampling defaults", "general.": "General", "clip.": "Vision tower"}
    sections: dict[str, list[tuple[str, str]]] = {
        h: [] for h in ("General", "Language model", "Vision tower", "Sampling defaults")
    }
    for key, value in metadata.items():
        if key.startswith("tokenizer."):
            continue
        prefix = next((p for p in headings if key.startswith(p)), None)
        sections[headings[prefix] if prefix else "Language model"].append(
            (key.removeprefix(prefix or ""), _shortened(value))
        )
    return [*sections.items(), ("Tokenizer", _tokenizer(metadata))]


def _tokenizer(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        types = Counter(metadata.get("tokenizer.ggml.token_type") or [])
        parts = [
            f"{count} {_TOKEN_TYPES.get(type, f'of type {type}')}" for type, count in sorted(types.items())
        ]
        rows.append(("tokens", f"{len(tokens):,}" + (f" ({', '.join(parts)})" if parts else "")))
    for key, value in metadata.items():
        name = key.removeprefix("tokenizer.").removeprefix("ggml.")
        if not key.startswith("tokenizer.") or name in ("tokens", "token_type"):
            continue
        if (
            name.endswith("_token_id")
            and isinstance(tokens, list)
            and isinstance(value, int)
            and value < len(tokens)
        ):
            rows.append((name, f"{value} {_shortened(tokens[value])}"))
        elif name in ("merges", "scores") and isinstance(value, list):
            rows.append((name, f"{len(value):,}"))
        else:
            rows.append((name, _shortened(value)))
    return rows


def _shortened(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(_shortened(item) for item in value[:_SHOWN_ITEMS])
        return f"[{shown}, ... {len(value):,} in all]" if len(value) > _SHOWN_ITEMS else f"[{shown}]"
    if isinstance(value, str):
        first = value.split("\n", 1)[0]
        shown = first[:_SHOWN_CHARACTERS]
        return _visible(shown) if shown == value else f"{_visible(shown)}... ({len(value):,} characters)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _visible(text: str) -> str:
    """Control characters as escapes: a file's strings must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _print_section(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(escape(_visible(name)), escape(value))
    console.print(table)


def _print_tensors(console: Console, tensors: Sequence[TensorInfo]) -> None:
    table = Table("tensor", "type", "shape", box=None, header_style="bold")
    table.add_column("bytes", justify="right")
    for tensor in tensors:
        table.add_row(
            escape(_visible(tensor.name)),
            tensor.type,
            " x ".join(map(str, tensor.shape)),
            f"{tensor.n_bytes:,}",
        )
    console.print("\n[bold]Tensors[/bold]")
    console.print(table)
