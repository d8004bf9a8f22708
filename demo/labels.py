"""What each cell of a picture or of a clip's step shows: the labels of the helper losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from demo import clips, data
from demo.clips import Clip
from demo.data import CELL, CHARACTERS, MAX_TEXT, SHAPES, Picture

IGNORE = -100
KINDS = {name: k for k, name in enumerate((*SHAPES, *CHARACTERS), 1)}  # 0: background
COLOUR_ID = {name: k for k, name in enumerate(data.COLOURS)}
MOTIONS = ("", "left", "right", "up", "down")
LABELS = {
    "kind": len(KINDS) + 1,
    "colour": len(COLOUR_ID),
    "rank": 8,
    "same_colour": 8,
    "same_shape": 8,
    "total": 9,
    "centre": 2,
    "motion": len(MOTIONS),
    "touch": 2,
}


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
    if picture.fields:
        table["rank"] = table["total"] = [IGNORE] * (total + 1)
    if picture.text or picture.fields:
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
    """[rows, columns, MAX_TEXT] of the merged grid: 1 + index of the k-th character where its middle is.

    Of a form, the k-th of each value.
    """
    rows, columns = picture.height // CELL, picture.width // CELL
    slots = np.zeros((rows, columns, MAX_TEXT), np.int64)
    things = iter(picture.things)
    for key, value in picture.fields:
        for k, thing in zip(range(-len(key), len(value)), things, strict=False):
            if k >= 0:
                x0, y0, x1, y1 = thing.box
                column, row = int((x0 + x1) / 2) // CELL, int((y0 + y1) / 2) // CELL
                slots[min(row, rows - 1), min(column, columns - 1), k] = 1 + CHARACTERS.index(thing.name)
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


def step_labels(clip: Clip, step: int, cell: int) -> dict[str, np.ndarray]:
    """What is in each cell of two frames, and where it goes: labels [rows, columns]."""
    i, j = 2 * step, 2 * step + 1
    blocks = np.concatenate([_blocks(clip.ids[i], cell), _blocks(clip.ids[j], cell)], -1)
    covered = np.stack([(blocks == k).sum(-1) for k in range(1, len(clip.things) + 1)])
    owner = np.where(covered.max(0) >= 0.1 * cell * cell, covered.argmax(0) + 1, 0)
    table = {
        "kind": [0, *(KINDS[t.name] for t in clip.things)],
        "colour": [IGNORE, *(COLOUR_ID[t.colour] for t in clip.things)],
        "motion": [IGNORE, *(MOTIONS.index(clips.motion(path[i], path[j])) for path in clip.paths)],
        "touch": [IGNORE, *(int(i in clip.touches or j in clip.touches) for _ in clip.things)],
    }
    return {name: np.asarray(values, np.int64)[owner] for name, values in table.items()}


def clip_labels(drawn: list[Clip]) -> dict[str, Tensor]:
    """[clips * steps, cells], as `dense_labels`."""
    steps = [(clip, step) for clip in drawn for step in range(len(clip.frames) // 2)]
    patches = [step_labels(*s, CELL // 2) for s in steps]
    merged = [step_labels(*s, CELL) for s in steps]
    labels = {name: np.stack([_merge_order(p[name]) for p in patches]) for name in patches[0]}
    labels |= {f"merged_{name}": np.stack([m[name].reshape(-1) for m in merged]) for name in merged[0]}
    return {name: torch.from_numpy(value) for name, value in labels.items()}
