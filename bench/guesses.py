"""Prints what tokens cost that are computed before they are drawn, and what they save.

First a step of 1 to 16 rows of one sequence: the drawn token's and guesses. `worth`: how many times the
plain step's tokens come where every guess is right; `break-even`: the share of right guesses that pays.

Then answers as given, token by token, whatever the model would say (its speed does not depend on it), with
prompt lookup and without, in turns: a table as JSON, a paragraph corrected, a description that repeats
nothing. The texts are this file's; a token is a word, a digit or a run of other characters, about as Qwen2's
vocabulary has it.

    python bench/guesses.py -m 2b.gguf
"""

from __future__ import annotations

import json
import re
from statistics import median
from time import perf_counter

import click
import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.cli.bench_tables import table
from qwen2vl_q.cli.model_file import model_file
from qwen2vl_q.engine.options import GenerateOptions
from qwen2vl_q.engine.stats import GenerationStats

_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_SPAN = 60  # cells of a page that the steps use

_ITEMS = [
    ("Espresso beans, dark roast, 1 kg", 2, 18.9), ("Paper filters no. 4", 3, 2.49),
    ("Oat drink, barista, 1 l", 12, 1.99), ("Cups, stoneware, 180 ml", 6, 7.5),
    ("Descaler, liquid", 1, 6.25), ("Milk jug, steel, 350 ml", 1, 14.0),
]  # fmt: skip
_RECEIPT = "Read the receipt as JSON with name, quantity and price of each article."
_JSON = json.dumps([{"name": name, "quantity": n, "price": price} for name, n, price in _ITEMS], indent=2)
_PARAGRAPH = (
    "The harbour was quiet when the ferry came in. Two men in yellow jackets waited at the ramp, and behind"
    " them a row of lorries stood with there engines off. Nobody spoke. A dog crossed the road, looked at the"
    " water, and went back the way it had come; only the gulls took any notice of it."
)
_CORRECTED = _PARAGRAPH.replace("there engines", "their engines")
_CAPTION = (
    "A narrow street leads uphill between whitewashed houses. Blue shutters are closed against the midday"
    " sun; a bicycle leans beside one doorway. Farther up, laundry hangs across the lane, and beyond it you"
    " can just make out the bell tower of a small church."
)
ANSWERS = {
    "a table as JSON": (_RECEIPT, _JSON),
    "a paragraph corrected": (f"Correct the spelling:\n{_PARAGRAPH}", _CORRECTED),
    "a description": ("Describe the picture.", _CAPTION),
}
_TOKEN = re.compile(r" ?[A-Za-z]+|\d| ?[^\w\s]+|\s+")


class Says:
    """A constraint that lets one answer through."""

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self._left, self._vocab_size = tokens[::-1], vocab_size

    def allowed(self) -> NDArray[np.uint8]:
        mask = np.zeros(self._vocab_size, np.uint8)
        mask[self._left[-1]] = 1
        return mask

    def accept(self, token: int) -> None:
        self._left.pop()


def step_seconds(model: Qwen2VL, rows: int, prompt: list[int], repeat: int) -> float:
    """Median of a step."""
    taken: list[float] = []
    while len(taken) < repeat:
        state = _native.SequenceState(model._native, len(prompt) + 64)
        state.prefill(_native.Prompt(model._native, prompt), [])
        for at in range(0, _SPAN - rows, rows):
            state.push(at)
            guesses = list(range(at + 1, at + rows))
            if guesses and state.guess(guesses) != len(guesses):
                raise ValueError("the guess does not fit into a page")
            started = perf_counter()
            _native.step([state], [1])
            taken.append(perf_counter() - started)
            for token in guesses:
                state.push(token)
    return median(taken)


def tokens_of(*texts: str) -> list[list[int]]:
    """A number for each different token."""
    numbers: dict[str, int] = {}
    return [[numbers.setdefault(token, len(numbers)) for token in _TOKEN.findall(text)] for text in texts]


def told(model: Qwen2VL, prompt: list[int], answer: list[int], lookup: int | None) -> GenerationStats:
    """What it takes to say it."""
    options: GenerateOptions = {"ignore_eos": True, "constraint": Says(answer, model.config.vocab_size)}
    options |= {"prompt_lookup_num_tokens": lookup, "max_new_tokens": len(answer)}
    found = list(model.generate(prompt, **options))
    if found != answer:
        raise ValueError("the answer was not told as given")
    return model.last_stats


@click.command(help=__doc__.replace("\n\n    python", "\n\n\b\n    python"))
@click.option("-m", "--model", type=model_file, default="demo", show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1, 1024))
@click.option(
    "--depth", type=click.IntRange(1), default=512, show_default=True, help="Tokens before the steps'."
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True)
def main(model: str, threads: int | None, depth: int, repeat: int) -> None:
    loaded = Qwen2VL.from_gguf(model, n_threads=threads)
    click.echo(f"{loaded!r}\n")
    prompt = [i % 250 for i in range(depth // 64 * 64 or 64)]  # steps begin with a page
    seconds = {rows: step_seconds(loaded, rows, prompt, 20 * repeat) for rows in _ROWS}
    one = seconds[1]
    lines = [("rows", "ms", "of one row's", "worth", "break-even")]
    for rows, each in seconds.items():
        share = f"{(each / one - 1) / (rows - 1):.0%}" if rows > 1 else ""
        lines.append((str(rows), f"{each * 1e3:.2f}", f"{each / one:.2f}", f"{rows * one / each:.2f}", share))
    click.echo(table(lines))
    said = [("answer", "tokens", "tokens/s without", "with", "ratio", "right guesses")]
    for name, (question, text) in ANSWERS.items():
        ids, answer = tokens_of(question, text)
        runs = [(told(loaded, ids, answer, 0), told(loaded, ids, answer, None)) for _ in range(repeat)]
        plain, looking = (median(run[i].decode_tokens_per_second for run in runs) for i in range(2))
        last = runs[-1][1]
        right = f"{last.confirmed_tokens} of {last.guessed_tokens}"
        said.append(
            (name, str(len(answer)), f"{plain:.1f}", f"{looking:.1f}", f"{looking / plain:.2f}", right)
        )
    click.echo("\n" + table(said))


if __name__ == "__main__":
    main()
