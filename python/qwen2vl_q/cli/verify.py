"""qwen2vl-q verify: whether a file says what another one, or a checkpoint, does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.cli.device import device_option
from qwen2vl_q.cli.interruption import ended_by_signal
from qwen2vl_q.cli.model_file import model_file, model_or_checkpoint, tower_file, tower_of
from qwen2vl_q.cli.options import COUNT, FiniteRange
from qwen2vl_q.cli.progress import StageBars

if TYPE_CHECKING:
    from qwen2vl_q.measure.conversations import Conversation
    from qwen2vl_q.measure.verify import Thresholds, Verification

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Compare a file with another one, or with a checkpoint.")
@click.argument("model", metavar="A", type=model_file)
@click.argument("reference", metavar="B", type=model_or_checkpoint)
@click.option(
    "--mmproj", type=tower_file, metavar="FILE", help="A's vision tower.  [default: the one beside it]"
)
@click.option(
    "--reference-mmproj",
    type=tower_file,
    metavar="FILE",
    help="B's vision tower.  [default: the one beside it]",
)
@click.option("--images", type=_FOLDER, metavar="DIR", help="Ask about every picture in it.")
@click.option(
    "--conversation",
    "conversations",
    type=_FILE,
    multiple=True,
    metavar="FILE.json",
    help="As chat's /save writes it; may be repeated.",
)
@click.option(
    "--max-pixels", type=COUNT, default=512 * 28 * 28, show_default=True, help="Of a picture of --images."
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Of B's own answers at most.",
)
@click.option(
    "--precision",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    show_default=True,
    help="Of A; exact: the error of its weights alone.",
)
@click.option("-t", "--threads", type=click.IntRange(1, 1024), help="[default: the physical cores allowed]")
@device_option
@click.option(
    "--max-error",
    type=FiniteRange(0),
    default=0.1,
    show_default=True,
    help="Squared error of any tensor over its squared values.",
)
@click.option(
    "--min-cosine",
    type=FiniteRange(-1, 1),
    default=0.99,
    show_default=True,
    help="Of any picture's embeddings.",
)
@click.option("--max-kl", type=FiniteRange(0), default=0.1, show_default=True, help="Mean, nats a token.")
@click.option(
    "--min-agreement",
    type=FiniteRange(0, 1),
    default=0.9,
    show_default=True,
    help="Share of the same likeliest token.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, every tensor and picture in it.")
def verify(
    model: str,
    reference: str,
    mmproj: str | None,
    reference_mmproj: str | None,
    images: Path | None,
    conversations: Sequence[Path],
    max_pixels: int,
    tokens: int,
    precision: Literal["fast", "exact"],
    threads: int | None,
    device: str,
    max_error: float,
    min_cosine: float,
    max_kl: float,
    min_agreement: float,
    as_json: bool,
) -> None:
    """Compare a model's file A with a reference B: a GGUF file of any type, with its vision tower inside or
    beside it, or a checkpoint's folder.

    Three things are compared: the dequantized weights, tensor by tensor; the vision tower's embeddings of
    pictures; and the next-token distributions over answers that are given to both, by their Kullback-Leibler
    divergence KL(B || A) and how often the likeliest token is the same. B computes in float32 on
    the CPU (exact), A as it would (fast): --precision exact leaves the error of its weights alone.

    Without --images and --conversation there are cards and texts of the package's own. About pictures of
    --images B's own greedy answers count. A checkpoint becomes a temporary file of a type that loses nothing,
    in TMPDIR.

    The exit code is 0 where A keeps to all thresholds, 1 where it does not or cannot be compared. The
    defaults are meant for released models in 3 and more bits, of which none was measured; with random weights
    likeliest tokens mean little.

    \b
    Examples:
      qwen2vl-q verify q4.gguf ./Qwen2-VL-2B-Instruct
      qwen2vl-q verify q4.gguf f16.gguf --images ./photos --max-kl 0.02
      qwen2vl-q verify Qwen2-VL-2B-Instruct-Q4_K_M.gguf ./Qwen2-VL-2B-Instruct --precision exact --json
    """
    from qwen2vl_q.measure import verify as measure

    allowed = measure.Thresholds(max_error, min_cosine, max_kl, min_agreement)
    asked = _asked(images, conversations, max_pixels)
    with ended_by_signal("nothing is compared"), StageBars() as bars:
        found = measure.verify(
            model,
            reference,
            mmproj=mmproj or tower_of(model),
            reference_mmproj=reference_mmproj or tower_of(reference),
            conversations=asked or None,
            precision=precision,
            n_threads=threads,
            device=device,
            max_new_tokens=tokens,
            progress=bars,
        )
    click.echo(json.dumps(as_dict(found, allowed), indent=2) if as_json else _report(found, allowed))
    if found.failures(allowed):
        raise click.exceptions.Exit(1)


def _asked(images: Path | None, files: Sequence[Path], max_pixels: int) -> list[Conversation]:
    from qwen2vl_q.cli import transcript
    from qwen2vl_q.measure.conversations import of_folder, of_messages

    asked = [] if images is None else of_folder(images, max_pixels)
    return asked + [each for file in files for each in of_messages(file.name, transcript.read(file))]


def as_dict(found: Verification, allowed: Thresholds) -> dict[str, Any]:
    """As --json prints it; what is not finite is null."""
    return {
        "model": found.model.path,
        "mmproj": found.model.mmproj,
        "reference": found.reference,
        "precision": found.precision,
        "isa": found.isa,
        "tensors": [
            {
                "name": tensor.name,
                "role": tensor.role,
                "type": tensor.type,
                "reference_type": tensor.reference_type,
                "parameters": tensor.parameters,
                "relative_squared_error": _finite(tensor.relative),
            }
            for tensor in found.tensors
        ],
        "pictures": [vars(picture) for picture in found.pictures],
        "tokens": found.divergence.tokens,
        "kl_mean": _finite(found.divergence.mean),
        "kl_p99": _finite(found.divergence.p99),
        "same_likeliest": found.divergence.agreement,
        "notes": list(found.notes),
        "thresholds": vars(allowed),
        "failures": found.failures(allowed),
        "passes": not found.failures(allowed),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _report(found: Verification, allowed: Thresholds) -> str:
    parts = [_roles(found), _worst(found)]
    if found.pictures:
        cosines = [picture.cosine for picture in found.pictures]
        parts.append(
            f"Vision tower: cosine {min(cosines):.6f} at least, "
            f"{sum(cosines) / len(cosines):.6f} on average, of {len(cosines)} pictures."
        )
    d = found.divergence
    parts.append(
        f"Next tokens: KL {d.mean:.2g} nats a token, 99 of 100 below {d.p99:.2g}; the same likeliest one for "
        f"{d.agreement:.4f} of {d.tokens} ({found.precision}, {found.isa}; the reference exact)."
    )
    parts += [f"note: {note}" for note in found.notes]
    failures = found.failures(allowed)
    verdict = [f"differs: {reason}" for reason in failures[:10]]
    if more := len(failures) - len(verdict):
        verdict.append(f"differs: {more} more (--json lists them)")
    parts.append("\n".join(verdict) or "The file keeps to every threshold.")
    return "\n\n".join(parts)


def _roles(found: Verification) -> str:
    from qwen2vl_q.measure.tensor_errors import relative_of

    groups: dict[tuple[str, str, str], list[Any]] = {}
    for tensor in found.tensors:
        groups.setdefault((tensor.role, tensor.type, tensor.reference_type), []).append(tensor)
    rows = [("tensors", "type", "reference", "count", "squared error", "worst")]
    for (role, type, reference), errors in groups.items():
        worst = max(error.relative for error in errors)
        rows.append((role, type, reference, str(len(errors)), f"{relative_of(errors):.2g}", f"{worst:.2g}"))
    return table(rows)


def _worst(found: Verification, shown: int = 5) -> str:
    worst = [tensor for tensor in found.worst[:shown] if tensor.relative]
    if not worst:
        return "Every weight is the reference's."
    rows = [("worst tensors", "type", "squared error")]
    return table([*rows, *((printable(t.name), t.type, f"{t.relative:.2g}") for t in worst)])
