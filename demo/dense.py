"""The helper losses: what each cell shows and where. Without them reading and boxes hardly start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.labels import IGNORE, LABELS
from demo.model import DenseHeads

WEIGHTS = {
    "kind": 1.0,
    "colour": 0.5,
    "rank": 0.5,
    "same_colour": 0.4,
    "same_shape": 0.4,
    "total": 0.2,
    "centre": 1.0,
    "motion": 1.0,
    "touch": 1.0,
}
BOX_WEIGHT, CELL_WEIGHT, SLOT_WEIGHT = 1.5, 0.5, 1.0
BACKGROUND_WEIGHT = 0.2  # most cells are background, and easy


def two_bins(x: Tensor, bins: int) -> Tensor:
    """0..1 -> weights [..., bins] on the two bins around it"""
    return (1 - (x.unsqueeze(-1) * (bins - 1) - torch.arange(bins, device=x.device)).abs()).clamp_min(0)


def cell_centres(rows: int, columns: int, merged: bool, device: torch.device) -> Tensor:
    """[cells, 2]: x, y in 0..1, in the order of the patches (rows, columns: merged grid) or merged cells."""
    scale = 1 if merged else 2
    ys, xs = torch.meshgrid(
        (torch.arange(rows * scale, device=device) + 0.5) / (rows * scale),
        (torch.arange(columns * scale, device=device) + 0.5) / (columns * scale),
        indexing="ij",
    )
    grid = torch.stack((xs, ys), -1)
    if not merged:
        grid = grid.view(rows, 2, columns, 2, 2).transpose(1, 2)
    return grid.reshape(-1, 2)


def dense_loss(
    heads: DenseHeads, features: Tensor, labels: dict[str, Tensor], grid: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """features [N, cells, width]; labels of `batches.dense_labels` or `clip_labels`. -> the weighted sum and
    accuracies"""
    merged = heads.slots is not None
    prefix = "merged_" if merged else ""
    device = features.device
    things = labels[f"{prefix}kind"] > 0
    loss = torch.zeros((), device=device)
    seen: dict[str, Tensor] = {}
    for name, size in LABELS.items():
        if prefix + name not in labels:
            continue
        logits, target = heads.labels[name](features).float(), labels[prefix + name]
        weight = torch.ones(size, device=device)
        if name in ("kind", "centre"):
            weight[0] = BACKGROUND_WEIGHT
        if bool((target != IGNORE).any()):
            loss = loss + WEIGHTS[name] * F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), weight=weight, ignore_index=IGNORE
            )
            at = target == 1 if name == "centre" else things & (target != IGNORE)
            seen[name] = (logits.argmax(-1) == target)[at].float().mean()
    if f"{prefix}box" in labels:
        more, errors = place_loss(heads, features, labels, grid)
        loss, seen = loss + more, seen | errors
    if heads.slots is not None and "slots" in labels:
        logits, target = (
            heads.slots(features).float().unflatten(-1, (target_slots(labels), -1)),
            labels["slots"],
        )
        filled = target > 0
        if bool(filled.any()):
            weight = torch.ones(logits.shape[-1], device=device)
            weight[0] = BACKGROUND_WEIGHT
            loss = loss + SLOT_WEIGHT * F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight=weight)
            seen["slots"] = (logits.argmax(-1) == target)[filled].float().mean()
    return loss, {prefix + name: value.detach() for name, value in seen.items()}


def place_loss(
    heads: DenseHeads, features: Tensor, labels: dict[str, Tensor], grid: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of the boxes of the things that cover the cells, and of the cells' own places."""
    merged = heads.slots is not None
    prefix = "merged_" if merged else ""
    device = features.device
    things = labels[f"{prefix}kind"] > 0
    bins = heads.BINS
    places = heads.places(features).float().unflatten(-1, (6, bins)).log_softmax(-1)
    truth = labels[f"{prefix}box"][things]
    at_things = places[things]
    loss = -BOX_WEIGHT * (two_bins(truth, bins) * at_things[:, :4]).sum(-1).mean()
    centres = cell_centres(*grid, merged, device).expand(len(features), -1, 2)
    loss = loss - CELL_WEIGHT * (two_bins(centres, bins) * places[:, :, 4:]).sum(-1).mean()
    values = torch.arange(bins, device=device) / (bins - 1)
    box_error = ((at_things[:, :4].exp() * values).sum(-1) - truth).abs().mean()
    cell_error = ((places[:, :, 4:].exp() * values).sum(-1) - centres).abs().mean()
    return loss, {"box_error": box_error, "cell_error": cell_error}


def target_slots(labels: dict[str, Tensor]) -> int:
    return int(labels["slots"].shape[-1])
