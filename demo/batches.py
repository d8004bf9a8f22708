"""Training batches: pictures of one size, several questions on each behind a shared prefix, dense labels."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from demo import clips, data, forms, questions
from demo.clips import Clip
from demo.data import CELL, Picture
from demo.labels import IGNORE, clip_labels, dense_labels
from demo.questions import Turn
from demo.vocabulary import SYSTEM_PROMPT, TOKEN_ID

TASK_ID = {name: k for k, name in enumerate((*questions.TASKS, "chat", "second"))}
LINKED_TURNS = 0.2  # share of the conversations with a second question


@dataclass(frozen=True)
class Pairs:
    """Two pictures at once: their sides, and how many things each has at most."""

    sides: tuple[int, ...] = (84, 112, 140)
    most: int = 2


@dataclass(frozen=True)
class Stage:
    """Which pictures; `kinds` are weights of KIND_NAMES."""

    sides: tuple[int, ...] = (84, 112, 140, 168, 196, 224)
    level: data.Level = field(default_factory=data.Level)
    kinds: tuple[float, ...] = (0.5, 1.0, 1.5, 1.5, 0.6, 0.1, 2.0, 2.0)
    odd: float = 0.3  # share of the pictures that are drawn at an odd size and resized
    tokens: int = 2600  # of the language model, with padding, in a batch
    pairs: Pairs = field(default_factory=Pairs)
    large_clips: float = 0.0  # share of the clips that are enlarged as the runtime does unless told otherwise


KIND_NAMES = ("single", "few", "counted", "text", "two", "chat", "form", "clip")
CLIP_SIDES, LARGE_SIDES = (112, 140), (308, 336)
FORM_WIDTHS, FORM_HEIGHTS = (168, 196, 196, 224, 252, 336), (84, 112, 140, 168, 196, 224)
CLIP_QUESTIONS = 2
POINTS = 0.6  # share of the pictures of shapes with a point to give


@dataclass
class Batch:
    """One step. P patches a picture in merge order, M = P / 4 merged cells, B conversations of L tokens.

    `dense`, per picture of a conversation: name -> labels [B, P] of the patches, and "merged_" + name [B, M];
    "box" [B, P, 4]: of the thing that covers the patch, 0..1; "slots" [B, M, MAX_TEXT]: 1 + the index of the
    k-th character where that is in the cell. Of a clip, each step counts as a picture: B * steps.
    """

    pixels: list[Tensor]  # uint8, each picture's: [B, height, width, 3]; clip: [B, frames, ...]
    dense: list[dict[str, Tensor]]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [3, B, L]
    segments: Tensor  # [B, L]; 0: shared prefix, -1: padding
    labels: Tensor  # [B, L]: the next token where it belongs to an answer
    answers: Tensor  # [B, L]: number of the answer in the batch
    tasks: Tensor  # [answers]
    kind: str


def draw_clip(rng: random.Random, size: tuple[int, int], frames: int, odd: bool) -> Clip:
    """A clip of that width and height; if odd, it is drawn at another size and resized."""
    width, height = (rng.randint(*clips.SIDES) for _ in range(2)) if odd else size
    if frames == clips.BOUNCE_FRAMES:
        clip = clips.draw_bounce(rng, width, height, rng.randint(0, clips.MOST_BOUNCES))
    else:
        clip = rng.choice((clips.draw_move, clips.draw_order))(rng, width, height, frames)
    return clip.resized(*size) if odd else clip


def draw(rng: random.Random, size: tuple[int, int], kind: str, stage: Stage) -> Picture:
    """A picture of that width and height; some are drawn at an odd size and resized as the processor does."""
    width, height = size
    if odd := rng.random() < stage.odd:
        width, height = width + rng.randint(-13, 13), height + rng.randint(-13, 13)
    if kind == "form":
        picture = forms.draw_form(rng, width, height)
    elif kind == "text":
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

    def prefix(self, grids: Sequence[tuple[int, ...]]) -> tuple[list[int], np.ndarray]:
        """System prompt and pictures: ids and M-RoPE positions [3, n]; grids are merged rows and columns, of
        clips steps before."""
        ids = self.encode(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        parts = [np.tile(np.arange(len(ids)), (3, 1))]
        start = len(ids)
        for grid in grids:
            pad = TOKEN_ID["<|video_pad|>" if len(grid) == 3 else "<|image_pad|>"]
            ids += [TOKEN_ID["<|vision_start|>"], *[pad] * math.prod(grid), TOKEN_ID["<|vision_end|>"]]
            parts.append(np.full((3, 1), start))
            steps_rows_columns = (1, *grid)[-3:]
            parts.append(start + 1 + np.indices(steps_rows_columns).reshape(3, -1))
            start += 1 + max(steps_rows_columns)
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
    assembler: Assembler, grids: Sequence[tuple[int, ...]], rows: list[list[list[Turn]]]
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


def clip_batch(assembler: Assembler, rng: random.Random, stage: Stage) -> Batch:
    """Clips of one size and length, which sets what happens in them."""
    large = rng.random() < stage.large_clips
    width, height = (rng.choice(LARGE_SIDES if large else CLIP_SIDES) for _ in range(2))
    frames = rng.choice((*clips.MOVE_FRAMES, clips.BOUNCE_FRAMES))
    grid = frames // 2, height // CELL, width // CELL
    drawn = [
        draw_clip(rng, (width, height), frames, large or rng.random() < stage.odd)
        for _ in range(max(2, stage.tokens // (20 + math.prod(grid) + CLIP_QUESTIONS * 22)))
    ]
    rows = [_group(rng, [questions.ask_clip(rng, clip) for _ in range(CLIP_QUESTIONS)]) for clip in drawn]
    tensors, tasks = assemble(assembler, [grid], rows)
    pixels = torch.from_numpy(np.stack([clip.frames for clip in drawn]))
    return Batch(pixels=[pixels], dense=[clip_labels(drawn)], tasks=tasks, kind="clip", **tensors)


def ask(rng: random.Random, picture: Picture, number: int) -> list[Turn]:
    """Turns about one picture, of every task that it has."""
    if picture.fields:
        return [questions.form(rng, picture), *(questions.field(rng, picture) for _ in range(number - 1))]
    turns = questions.ask(rng, picture, number)
    if not picture.text and rng.random() < POINTS and (point := questions.point(rng, picture)) is not None:
        turns.insert(rng.randrange(len(turns) + 1), point)
    return turns


def make_batch(assembler: Assembler, rng: random.Random, stage: Stage) -> Batch:
    kind = rng.choices(KIND_NAMES, stage.kinds)[0]
    if kind == "clip":
        return clip_batch(assembler, rng, stage)
    sides = stage.pairs.sides if kind == "two" else stage.sides
    pictures_each = {"two": 2, "chat": 0}.get(kind, 1)
    sizes = [(rng.choice(sides), rng.choice(sides)) for _ in range(pictures_each)]
    if kind == "form":
        sizes = [(rng.choice(FORM_WIDTHS), rng.choice(FORM_HEIGHTS))]
    grids = [(h // CELL, w // CELL) for w, h in sizes]
    visual = sum(r * c for r, c in grids)
    number = {"chat": 6, "two": 4, "text": 3, "form": 3}.get(kind, 5)
    batch_size = max(2, stage.tokens // (20 + visual + number * (40 if kind == "form" else 24)))
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
            turns = ask(rng, picture, number)
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
