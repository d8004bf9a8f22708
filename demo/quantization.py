"""What each file type costs the demo model: a table and a plot, quantization.md and quantization.svg.

python -m demo.quantization demo/checkpoint

Accuracy, and how far each type's next-token distributions are from those of the F32 file in exact precision,
over answers that are given (teacher-forced). No date, no timing: the same checkpoint on the same instruction
set gives the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from demo import cases, evaluate
from demo.cases import Case
from demo.evaluate import Accuracy
from qwen2vl_q import Qwen2VL
from qwen2vl_q.convert import FILE_TYPES, Recipe, Report, convert_checkpoint
from qwen2vl_q.measure.divergence import Floats, log_softmax

FIRST_SEED = 2_000_000  # training, the tests and demo/README.md use others
Precision = Literal["fast", "exact"]


# --- figures ---


@dataclass(frozen=True)
class Effort:
    per_task: int = 1000  # questions for the accuracies
    tokens: int = 5000  # of answers, at least, for the distributions
    exact_per_task: int = 50  # of the same questions, asked in exact precision too


@dataclass(frozen=True)
class Distributions:
    """Of one model beside the reference, over the same tokens."""

    divergence: float  # mean Kullback-Leibler divergence, nats a token
    agreement: float  # share of the tokens with the same likeliest one
    tokens: int


@dataclass(frozen=True)
class Row:
    """`same_as_reference`, `same_as_exact`: shares of answers identical to those of the F32 file in exact
    precision, and to those of the same file in exact precision."""

    name: str
    n_bytes: int
    bits_per_weight: float
    accuracy: dict[str, Accuracy]
    distributions: Distributions
    same_as_reference: float
    same_as_exact: float

    @property
    def mean_accuracy(self) -> float:
        """Over the tasks, each as much as another."""
        return sum(a.value for a in self.accuracy.values()) / len(self.accuracy)

    @property
    def standard_error(self) -> float:
        return math.hypot(*(a.standard_error for a in self.accuracy.values())) / len(self.accuracy)


def compare(reference: Iterable[Floats], other: Iterable[Floats]) -> Distributions:
    """Log-probabilities [n_tokens, vocab_size], answer by answer."""
    divergence, agreeing, tokens = 0.0, 0, 0
    for p, q in zip(reference, other, strict=True):
        divergence += float((np.exp(p) * (p - q)).sum())
        agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Distributions(divergence / tokens, agreeing / tokens, tokens)


def identical(a: Sequence[str], b: Sequence[str]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def predictions(model: Qwen2VL, asked: Iterable[Case]) -> Iterator[Floats]:
    """For each case, log-probabilities of the tokens of its last answer and its end, given the right ones."""
    for case in asked:
        given = [turn.answer for turn in case.turns]
        prompt, images = model.encode_chat(evaluate.messages(case, given[:-1]))
        answer = model.tokenize(f"{given[-1]}<|im_end|>", parse_special=True)
        logits = model.logits([*prompt, *answer], images)
        yield log_softmax(logits[len(prompt) - 1 : -1])


def with_tokens(model: Qwen2VL, tokens: int) -> list[Case]:
    """Cases of every task in turn, until their last answers have so many tokens."""
    asked: list[Case] = []
    while tokens > 0:
        seed, k = divmod(len(asked), len(cases.TASKS))
        asked.append(cases.case(cases.TASKS[k], FIRST_SEED + seed))
        tokens -= len(model.tokenize(asked[-1].turns[-1].answer, parse_special=True)) + 1
    return asked


# --- measuring ---


class Measurement:
    """One checkpoint's questions, and the reference's answers and distributions."""

    def __init__(self, reference: Report, effort: Effort) -> None:
        self.effort = effort
        self.asked = [
            cases.case(task, FIRST_SEED + k) for k in range(effort.per_task) for task in cases.TASKS
        ]
        model = Qwen2VL.from_gguf(reference.path, precision="exact")
        self.isa = model.isa
        self.forced = with_tokens(model, effort.tokens)
        self.distributions = list(predictions(model, self.forced))
        self.answers = self.ask(reference, "exact", self.asked)
        self.reference = self._row("f32, exact", reference, self.answers, self.distributions, self.answers)

    def ask(self, report: Report, precision: Precision, asked: Sequence[Case]) -> list[str]:
        return evaluate.run(asked, evaluate.with_gguf(str(report.path), precision), len(asked))

    def measure(self, name: str, report: Report) -> Row:
        answers = self.ask(report, "fast", self.asked)
        some = self.asked[: self.effort.exact_per_task * len(cases.TASKS)]
        exact = self.ask(report, "exact", some)
        model = Qwen2VL.from_gguf(report.path)
        return self._row(name, report, answers, predictions(model, self.forced), exact)

    def _row(
        self,
        name: str,
        report: Report,
        answers: Sequence[str],
        distributions: Iterable[Floats],
        exact: Sequence[str],
    ) -> Row:
        accuracy = {}
        for k, task in enumerate(cases.TASKS):
            accuracy[task] = Accuracy.of(self.asked[k :: len(cases.TASKS)], answers[k :: len(cases.TASKS)])
        outputs = [tensor.output for tensor in report.tensors]
        return Row(
            name,
            report.n_bytes,
            8 * sum(t.n_bytes for t in outputs) / sum(t.n_elements for t in outputs),
            accuracy,
            compare(self.distributions, distributions),
            identical(self.answers, answers),
            identical(exact, answers[: len(exact)]),
        )


# --- the report ---


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the heading, and only the first column is text."""
    lines = [rows[0], ("---", *["---:"] * (len(rows[0]) - 1)), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def costs(rows: Sequence[Row]) -> str:
    heading = (
        "type", "bytes", "bits a weight", "KL divergence", "same likeliest token", "accuracy",
        "answers as f32, exact", "answers as its own exact",
    )  # fmt: skip
    return table(
        [
            heading,
            *(
                (
                    row.name,
                    f"{row.n_bytes:,}",
                    f"{row.bits_per_weight:.2f}",
                    f"{row.distributions.divergence:.2g}",
                    f"{row.distributions.agreement:.4f}",
                    f"{row.mean_accuracy:.4f} ± {row.standard_error:.4f}",
                    f"{row.same_as_reference:.4f}",
                    f"{row.same_as_exact:.4f}",
                )
                for row in rows
            ),
        ]
    )


def accuracies(rows: Sequence[Row]) -> str:
    cells = [
        (task, *(f"{r.accuracy[task].value:.3f} ± {r.accuracy[task].standard_error:.3f}" for r in rows))
        for task in cases.TASKS
    ]
    return table([("task", *(row.name for row in rows)), *cells])


def markdown(rows: Sequence[Row], effort: Effort, command: str, made_of: str) -> str:
    tokens = rows[0].distributions.tokens
    asked, asked_exact = (
        n * len(cases.TASKS) for n in (effort.per_task, min(effort.exact_per_task, effort.per_task))
    )
    return f"""# What each file type costs the demo model

`{command}` wrote this, from {made_of}.

{costs(rows)}

![divergence and accuracy against size](quantization.svg)

A file's type is that of most of its matrices: the embedding, the vision tower (Q8_0 in files of fewer bits
than 8) and what a mix of types keeps better have their own (`convert/recipe.py`). Precision is fast where it
is not said.

- KL divergence: nats a token, from the next-token distributions of the F32 file in exact precision; the mean
  over {tokens:,} tokens of right answers, which were given. Same likeliest token: over the same tokens.
- Accuracy: the mean of the tasks below.
- Answers as f32, exact: identical texts, of {asked:,} greedy answers. As its own exact: identical to those of
  the same file in exact precision, of {asked_exact:,}.

## Accuracy by task

{accuracies(rows)}

± is one standard error, of {effort.per_task:,} questions a task. Each column has the same questions, so that
columns differ by less than that by chance.
"""


def plot(rows: Sequence[Row], out: Path) -> None:
    """Divergence and accuracy against size; the reference is the dashed line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "qwen2vl-q", "svg.fonttype": "none", "font.size": 11})
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullLocator

    reference, *others = rows
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7), layout="constrained")
    seen: list[float] = []
    for row, marker in zip(others, "oshvD^<>pPX*d" * len(others), strict=False):
        size = row.n_bytes / 1e6
        size *= 1.015 ** sum(abs(size / s - 1) < 0.01 for s in seen)  # side by side where sizes are equal
        seen.append(row.n_bytes / 1e6)
        label = f"{row.name} ({row.bits_per_weight:.2f} bits)"
        (points,) = upper.plot([size], [row.distributions.divergence], marker, markersize=9, label=label)
        lower.errorbar(
            [size], [row.mean_accuracy], [row.standard_error],
            fmt=marker, markersize=9, capsize=4, color=points.get_color(),
        )  # fmt: skip
    lower.axhline(reference.mean_accuracy, color="grey", linestyle="--", linewidth=1)
    lower.annotate(
        "f32, exact", (0.8, reference.mean_accuracy), xycoords=("axes fraction", "data"),
        xytext=(0, 4), textcoords="offset points", ha="right", color="grey",
    )  # fmt: skip
    upper.set(yscale="log", xscale="log", ylabel="KL divergence, nats a token")
    lower.set(xlabel="file, MB", ylabel="mean accuracy ± 1 s.e.")
    lower.set_xticks(
        [2**k * m for k in range(20) for m in (1, 1.25, 1.5) if min(seen) < 2**k * m < max(seen)]
    )
    lower.xaxis.set_minor_locator(NullLocator())
    lower.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(out, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--per-task", type=int, default=Effort.per_task, help="questions for the accuracies")
    parser.add_argument("--tokens", type=int, default=Effort.tokens, help="of answers, for the distributions")
    parser.add_argument("--exact-per-task", type=int, default=Effort.exact_per_task)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the two files")
    args = parser.parse_args()
    effort = Effort(args.per_task, args.tokens, args.exact_per_task)

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        reports = {
            type: convert_checkpoint(args.checkpoint, Path(folder) / f"{type}.gguf", Recipe(type))
            for type in FILE_TYPES
        }
        note("f32, exact ...")
        measurement = Measurement(reports["f32"], effort)
        rows = [measurement.reference]
        for type, report in sorted(reports.items(), key=lambda item: -item[1].n_bytes):
            note(f"{type} ...")
            rows.append(measurement.measure(type, report))
    weights = hashlib.sha256((args.checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]
    command = " ".join(["python -m demo.quantization", *sys.argv[1:]])
    made_of = f"weights of sha256 {weights}..., with the instruction set {measurement.isa}"
    (args.out / "quantization.md").write_text(markdown(rows, effort, command, made_of), encoding="utf-8")
    plot(rows, args.out / "quantization.svg")
    note(f"{args.out / 'quantization.md'}, {args.out / 'quantization.svg'}")


if __name__ == "__main__":
    main()
