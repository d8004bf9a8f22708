"""qwen2vl-q doctor: what this machine has, what to expect of it, what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from rich.table import Table

from qwen2vl_q.base.printable import printable
from qwen2vl_q.cli.output import count, say
from qwen2vl_q.cli.tables import stdout_console

if TYPE_CHECKING:
    from qwen2vl_q.measure.checkup import Checkup
    from qwen2vl_q.measure.machine import InstructionSet, Machine, Memory, Processors


@click.command(short_help="Show what this machine has, what to expect of it, what is missing.")
@click.option("--no-limits", is_flag=True, help="Measure nothing: no limits, nothing to expect.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")
def doctor(no_limits: bool, as_json: bool) -> None:
    """Show what this machine has, which kernels run and why, its limits, and what is missing.

    Five seconds measure what its processor and memory can do at most; from these and a model's operations
    and bytes follows about what to expect of a 2B and a 7B in 4 bits: within a third where nothing else
    runs. bench measures a real file. The exit code is 1 where something that should work does not.

    \b
    Examples:
      qwen2vl-q doctor
      qwen2vl-q doctor --no-limits                                # at once
      QWEN2VL_ISA=avx2 qwen2vl-q doctor                           # of another instruction set
      qwen2vl-q doctor --json | jq .expectations
    """
    from qwen2vl_q.measure.checkup import check_up

    if not no_limits:
        say("measuring for about five seconds", dim=True)
    found = check_up(measure=not no_limits)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found)
    if not found.healthy:
        raise click.exceptions.Exit(1)


def _print(found: Checkup) -> None:
    console = stdout_console()

    def section(title: str, table: Table) -> None:
        console.print(f"\n{title}" if title != "Machine" else title, style="bold", highlight=False)
        console.print(table, markup=False, highlight=False)

    section("Machine", _rows(_machine_rows(found)))
    section("Kernels", _rows([(each.name, _about_set(each, found.machine)) for each in found.machine.sets]))
    if found.limits is not None:
        section(f"Limits, {count(found.limits.n_threads, 'thread')}", _rows(_limit_rows(found)))
        section("Expect, about", _expectations(found))
    if found.findings:
        section("Missing", _rows([(each.kind, printable(each.text, 1000)) for each in found.findings]))


def _rows(rows: list[tuple[str, str]]) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _machine_rows(found: Checkup) -> list[tuple[str, str]]:
    machine = found.machine
    name = printable(f"{machine.processor}, {machine.system}".removeprefix(", "))
    rows = [
        ("processor", name),
        ("cores", _cores(machine.processors)),
        ("threads", _threads(machine.processors)),
        ("memory", _memory(machine.memory)),
    ]
    for each in found.devices:
        capability = ".".join(map(str, each.capability))
        text = f"{each.name}, {each.total_bytes / 1e9:.0f} GB, compute capability {capability}"
        rows.append((f"cuda:{each.index}", printable(text)))
    return rows


def _cores(processors: Processors) -> str:
    kinds = f", {processors.fast_cores} fast" if processors.fast_cores < processors.cores else ""
    return f"{processors.cores} ({count(processors.logical, 'logical processor')}{kinds})"


def _threads(processors: Processors) -> str:
    if processors.limited_by_quota:
        why = f"what the cgroup's quota of {processors.cpu_quota:g} processors grants, rounded up"
    elif processors.fast_cores < processors.cores:
        why = "one for each fast core"
    else:
        why = "one for each core"
    return f"{processors.threads}, {why}"


def _memory(memory: Memory) -> str:
    def gigabytes(n_bytes: int | None) -> str:
        return "unknown" if n_bytes is None else f"{n_bytes / 1e9:.1f} GB"

    limit = "" if memory.limit is None else f", the cgroup's limit {gigabytes(memory.limit)}"
    return f"{gigabytes(memory.total)}, available {gigabytes(memory.available)}{limit}"


def _about_set(each: InstructionSet, machine: Machine) -> str:
    if each.name == machine.isa:
        return "in use: QWEN2VL_ISA forces it" if machine.forced else "in use: the best that runs here"
    if each.runs:
        return "runs here"
    if not each.lacks:
        return "not in this build"
    return f"not here: needs {', '.join(each.lacks)}"


def _limit_rows(found: Checkup) -> list[tuple[str, str]]:
    limits = found.limits
    assert limits is not None
    return [
        ("8-bit products", f"{limits.int8_ops_per_s / 1e9:,.0f} Gop/s"),
        ("floating-point", f"{limits.float_ops_per_s / 1e9:,.0f} GFLOP/s"),
        ("reads of memory", f"{limits.read_bytes_per_s / 1e9:,.1f} GB/s"),
    ]


def _expectations(found: Checkup) -> Table:
    table = Table("model", box=None, header_style="bold")
    for column in ("photo 1024 x 683", "prefill", "decode", "memory"):
        table.add_column(column, justify="right")
    for each in found.expectations:
        table.add_row(
            each.model,
            f"{_two_digits(each.photo_seconds)} s",
            f"{_two_digits(each.prefill_tokens_per_second)} tokens/s",
            f"{_two_digits(each.decode_tokens_per_second)} tokens/s",
            f"{each.memory_bytes / 1e9:.1f} GB",
        )
    return table


def _two_digits(value: float) -> str:
    """More would say more than is known."""
    return f"{float(f'{value:.2g}'):,g}"
