"""Training batches: pictures of one size, several questions on each behind a shared prefix, dense labels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from demo import data, questions
from demo.data import CELL, CHARACTERS, MAX_TEXT, SHAPES, Picture
from demo.questions import Turn
from demo.vocabulary import SYSTEM_PROMPT, TOKEN_ID

IGNORE = -100
KINDS = {name: k for k, name in enumerate((*SHAPES, *CHARACTERS), 1)}  # 0: background
COLOUR_ID = {name: k for k, name in enumerate(data.COLOURS)}
LABELS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOUR_ID),
    "rank": 8,
    "same_colour": 8,
    "same_shape": 8,
    "total": 9,
    "centre": 2,
}
TASK_ID = {name: k for k, name in enumerate((*questions.TASKS, "chat", "second"))}
LINKED_TURNS = 0.2  # share of the conversations with a second question


@dataclass(frozen=True)
class Pairs:
    """Two pictures at once: their sides, and how many things each has at most."""

    sides: tuple[int, ...] = (84, 112, 140)
    most: int = 2


@dataclass(frozen=True)
class Stage:
    """Which pictures; `kinds` are weights of single, few, counted, text, two, chat."""

    sides: tuple[int, ...] = (84, 112, 140, 168, 196, 224)
    level: data.Level = field(default_factory=data.Level)
    kinds: tuple[float, ...] = (0.5, 1.0, 1.5, 1.5, 0.6, 0.1)
    odd: float = 0.3  # share of the pictures that are drawn at an odd size and resized
    tokens: int = 2600  # of the language model, with padding, in a batch
    pairs: Pairs = field(default_factory=Pairs)


KIND_NAMES = ("single", "few", "counted", "text", "two", "chat")


@dataclass
class Batch:
    """One step. P patches a picture in merge order, M = P / 4 merged cells, B conversations of L tokens.

    `dense`, per picture of a conversation: name -> labels [B, P] of the patches, and "merged_" + name [B, M];
    "box" [B, P, 4]: of the thing that covers the patch, 0..1; "slots" [B, M, MAX_TEXT]: 1 + the index of the
    k-th character where that is in the cell.
    """

    pixels: list[Tensor]  # per picture of a conversation: [B, height, width, 3] uint8
    dense: list[dict[str, Tensor]]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [3, B, L]
    segments: Tensor  # [B, L]; 0: shared prefix, -1: padding
    labels: Tensor  # [B, L]: the next token where it belongs to an answer
    answers: Tensor  # [B, L]: number of the answer in the batch
    tasks: Tensor  # [answers]
    kind: str


def _blocks(a: np.ndarray, cell: int) -> np.ndarray:
    """[h, w] -> [h / cell, w / cell, cell * cell]"""
    h, w = a.shape
    return (
        a.reshape(h // cell, cell, w // cell, cell).swapaxes(1, 2).reshape(h // cell, w // cell, cell * cell)
    )


def cell_labels(picture: Picture, cell: int) -> dict[str, np.ndarray]:
    """What covers each cell: labels [rows, columns] and its box [rows, columns, 4]."""
    blocks = _blocks(picture.ids, cell)
    things = picture.things
    covered = np.stack([(blocks == k).sum(-1) for k in range(1, len(things) + 1)])
    owner = np.where(covered.max(0) >= 0.1 * cell * cell, covered.argmax(0) + 1, 0)
    names, colours = [t.name for t in things], [t.colour for t in things]
    total = len(things)
    count_names = [total, *(names.count(n) for n in names)]
    count_colours = [total, *(colours.count(c) for c in colours)]
    table = {
        "kind": [0, *(KINDS[n] for n in names)],
        "colour": [IGNORE, *(COLOUR_ID[c] for c in colours)],
        "rank": [IGNORE, *range(total)],
        "same_colour": [IGNORE, *(c - 1 for c in count_colours[1:])],
        "same_shape": [IGNORE, *(c - 1 for c in count_names[1:])],
        "total": [total] * (total + 1),
    }
    if picture.text:
        table["same_colour"] = table["same_shape"] = [IGNORE] * (total + 1)
    labels = {name: np.asarray(values, np.int64)[owner] for name, values in table.items()}
    labels["centre"] = np.zeros_like(labels["kind"])
    for x0, y0, x1, y1 in (t.box for t in things):
        row, column = int((y0 + y1) / 2) // cell, int((x0 + x1) / 2) // cell
        labels["centre"][min(row, len(owner) - 1), min(column, owner.shape[1] - 1)] = 1
    scale = np.asarray([picture.width, picture.height] * 2, np.float32)
    boxes = np.zeros((total + 1, 4), np.float32)
    boxes[1:] = np.asarray([t.box for t in things], np.float32) / scale
    labels["box"] = np.clip(boxes[owner], 0, 1)
    return labels


def character_slots(picture: Picture) -> np.ndarray:
    """[rows, columns, MAX_TEXT] of the merged grid: 1 + index of the k-th character where its middle is."""
    rows, columns = picture.height // CELL, picture.width // CELL
    slots = np.zeros((rows, columns, MAX_TEXT), np.int64)
    if picture.text:
        for k, thing in enumerate(picture.things):
            x0, y0, x1, y1 = thing.box
            column = min(columns - 1, int((x0 + x1) / 2) // CELL)
            first, last = int(y0 + 3) // CELL, min(rows - 1, int(y1 - 3) // CELL)
            slots[first : last + 1, column, k] = 1 + CHARACTERS.index(thing.name)
    return slots


def _merge_order(a: np.ndarray) -> np.ndarray:
    """[rows, columns, ...] -> [patches, ...] in the order (rows / 2, columns / 2, 2, 2)"""
    rows, columns = a.shape[:2]
    return (
        a.reshape(rows // 2, 2, columns // 2, 2, *a.shape[2:])
        .swapaxes(1, 2)
        .reshape(rows * columns, *a.shape[2:])
    )


def dense_labels(pictures: list[Picture]) -> dict[str, Tensor]:
    patches = [cell_labels(p, CELL // 2) for p in pictures]
    merged = [cell_labels(p, CELL) for p in pictures]
    labels = {name: np.stack([_merge_order(p[name]) for p in patches]) for name in patches[0]}
    for name in merged[0]:
        labels[f"merged_{name}"] = np.stack([m[name].reshape(-1, *m[name].shape[2:]) for m in merged])
    labels["slots"] = np.stack([character_slots(p).reshape(-1, MAX_TEXT) for p in pictures])
    return {name: torch.from_numpy(value) for name, value in labels.items()}


def draw(rng: random.Random, size: tuple[int, int], kind: str, stage: Stage) -> Picture:
    """A picture of that width and height; some are drawn at an odd size and resized as the processor does."""
    width, height = size
    if odd := rng.random() < stage.odd:
        width, height = width + rng.randint(-13, 13), height + rng.randint(-13, 13)
    if kind == "text":
        picture = data.draw_text(rng, width, height, stage.level)
    elif kind == "counted":
        picture = data.draw_shapes(rng, width, height, data.choose_counted(stage.level.max_things))
    else:
        low, high = (1, 1) if kind == "single" else (1, 3)
        picture = data.draw_shapes(rng, width, height, data.choose_few(low, high))
    return picture.resized(*size) if odd else picture


class Assembler:
    """Pictures and turns -> token rows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prefix(self, grids: list[tuple[int, int]]) -> tuple[list[int], np.ndarray]:
        """System prompt and pictures: ids and M-RoPE positions [3, n]; grids are merged rows and columns."""
        ids = self.encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        parts = [np.tile(np.arange(len(ids)), (3, 1))]
        start = len(ids)
        for rows, columns in grids:
            ids += [TOKEN_ID["<|vision_start|>"], *[TOKEN_ID["<|image_pad|>"]] * (rows * columns)]
            ids.append(TOKEN_ID["<|vision_end|>"])
            parts.append(np.full((3, 1), start))
            grid = np.indices((rows, columns)).reshape(2, -1)
            parts.append(start + 1 + np.concatenate([np.zeros_like(grid[:1]), grid]))
            start += 1 + max(rows, columns)
            parts.append(np.full((3, 1), start))
            start += 1
        return ids, np.concatenate(parts, 1)

    def segment(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """A conversation after the prefix: ids, and per id the number of the turn that it answers, or -1."""
        ids: list[int] = []
        owner: list[int] = []
        for k, turn in enumerate(turns):
            question = (
                ("\n<|im_start|>user\n" if k else "") + turn.question + "<|im_end|>\n<|im_start|>assistant\n"
            )
            asked, answered = self.encode(question), self.encode(turn.answer + "<|im_end|>")
            ids += asked + answered
            owner += [-1] * len(asked) + [k] * len(answered)
        return ids, owner


def assemble(
    assembler: Assembler, grids: list[tuple[int, int]], rows: list[list[list[Turn]]]
) -> tuple[dict[str, Tensor], Tensor]:
    """rows[b] are the conversations about picture(s) b; they share the prefix and do not see each other."""
    prefix, prefix_positions = assembler.prefix(grids)
    next_position = int(prefix_positions.max()) + 1
    tasks: list[int] = []
    built = []
    for conversations in rows:
        ids, positions = list(prefix), [prefix_positions]
        segments, labels, answers = [0] * len(prefix), [IGNORE] * len(prefix), [IGNORE] * len(prefix)
        for number, turns in enumerate(conversations, 1):
            more, owner = assembler.segment(turns)
            targets = [t if o >= 0 else IGNORE for t, o in zip(more[1:], owner[1:], strict=True)]
            ids += more
            segments += [number] * len(more)
            labels += [*targets, IGNORE]
            answers += [len(tasks) + o if o >= 0 else IGNORE for o in owner[1:]] + [IGNORE]
            positions.append(np.tile(next_position + np.arange(len(more)), (3, 1)))
            tasks += [TASK_ID[t.task] if k == 0 else TASK_ID["second"] for k, t in enumerate(turns)]
        built.append((ids, segments, labels, answers, np.concatenate(positions, 1)))
    length = max(len(b[0]) for b in built)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([b[column] + [fill] * (length - len(b[column])) for b in built])

    positions = [np.pad(b[4], ((0, 0), (0, length - b[4].shape[1]))) for b in built]
    tensors = {
        "input_ids": padded(0, TOKEN_ID["<|endoftext|>"]),
        "segments": padded(1, -1),
        "labels": padded(2, IGNORE),
        "answers": padded(3, IGNORE),
        "position_ids": torch.from_numpy(np.stack(positions, 1)),
    }
    return tensors, torch.tensor(tasks)


def _group(rng: random.Random, turns: list[Turn]) -> list[list[Turn]]:
    """Conversations of one turn, some of two."""
    groups: list[list[Turn]] = []
    while turns:
        size = 2 if rng.random() < LINKED_TURNS else 1
        groups.append(turns[:size])
        turns = turns[size:]
    return groups


def make_batch(assembler: Assembler, rng: random.Random, stage: Stage) -> Batch:
    kind = rng.choices(KIND_NAMES, stage.kinds)[0]
    sides = stage.pairs.sides if kind == "two" else stage.sides
    pictures_each = {"two": 2, "chat": 0}.get(kind, 1)
    sizes = [(rng.choice(sides), rng.choice(sides)) for _ in range(pictures_each)]
    grids = [(h // CELL, w // CELL) for w, h in sizes]
    visual = sum(r * c for r, c in grids)
    number = {"chat": 6, "two": 4, "text": 3}.get(kind, 5)
    batch_size = max(2, stage.tokens // (20 + visual + number * 24))
    drawn: list[list[Picture]] = [[] for _ in sizes]
    rows: list[list[list[Turn]]] = []
    for _ in range(batch_size):
        if kind == "chat":
            rows.append(_group(rng, [questions.chat(rng, pictures=False) for _ in range(number)]))
            continue
        if kind == "two":
            pair = data.two_pictures(rng, sizes, stage.pairs.most)
            turns = [questions.differ(rng, *pair), *(questions.which(rng, *pair) for _ in range(number - 1))]
            rng.shuffle(turns)
            for pictures, picture in zip(drawn, pair, strict=True):
                pictures.append(picture)
        else:
            picture = draw(rng, sizes[0], kind, stage)
            drawn[0].append(picture)
            turns = questions.ask(rng, picture, number)
        rows.append(_group(rng, turns))
    tensors, tasks = assemble(assembler, grids, rows)
    pixels = [torch.from_numpy(np.stack([p.pixels for p in pictures])) for pictures in drawn]
    return Batch(pixels=pixels, dense=[dense_labels(p) for p in drawn], tasks=tasks, kind=kind, **tensors)


class Batches(IterableDataset[Batch]):
    """An endless stream of batches; each worker draws its own."""

    def __init__(self, assembler: Assembler, stage: Callable[[], Stage], seed: int) -> None:
        self.assembler, self.stage, self.seed = assembler, stage, seed

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        rng = random.Random(f"{self.seed}/{info.id if info else 0}")
        while True:
            yield make_batch(self.assembler, rng, self.stage())
