"""Trains the demo model: `python -m demo.train --minutes 80 --run RUN` (again after a kill: it resumes).

First the vision tower alone on the dense helper losses, then everything together. The schedule follows the
time that was spent, so the same command fits a slow and a fast machine. On a CPU that others use as well, one
process a core wastes least: set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun does,
and give --threads 1 --workers 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from demo import data
from demo.batches import TASK_ID, Assembler, Batch, Batches, Pairs, Stage
from demo.dense import dense_loss
from demo.labels import IGNORE
from demo.model import DemoModel
from demo.vocabulary import build

PEAK_RATE, FINAL_RATE = 1.2e-3, 0.03  # the second as a share of the first
WARM_UP = 100  # steps
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
SAVE_SECONDS, LOG_SECONDS = 120.0, 30.0
LONGEST_STEP = 20.0  # seconds: a longer one was a stopped process


def stage(progress: float, vision_share: float, tokens: int, texts: float) -> Stage:
    """The curriculum: small pictures and short texts first; then everything.

    A run without a share for the tower alone goes on from a trained model, and skips the first part.
    """
    grown = progress if vision_share > 0 else max(progress, 0.5)
    sides: tuple[int, ...] = (84, 112, 140, 168, 196, 224)
    if grown < 0.8:  # small ones are cheaper, and teach the same
        sides = (84, 112) if grown < 0.12 else (*(84, 112, 140) * 3, 168, 196, 224)
    if grown > 0.9:
        sides = (*sides * 3, 252, 280, 308, 336)
    length = (1, 2) if grown < 0.05 else (1, 4) if grown < 0.15 else (1, 6)
    most = 4 if grown < 0.1 else 6
    kinds = (0.3, 1.0, 2.6, 2.2, 1.5, 0.05, 6.0, 2.0)
    if progress < vision_share:
        kinds = (0.5, 0.8, 1.0, 3.5, 0.0, 0.0, 3.0, 1.0)
    odd = 0.1 if grown < 0.15 else 0.4
    kinds = (*kinds[:3], kinds[3] * texts, *kinds[4:])
    pairs = Pairs((84, 112), 1) if grown < 0.3 else Pairs((84, 112, 140), 2)
    if progress > 0.8:
        pairs = Pairs(sides, 2)
    return Stage(sides, data.Level(length, most), kinds, odd, tokens, pairs, 0.2 if grown > 0.55 else 0.0)


def answer_loss(model: DemoModel, hidden: Tensor, batch: Batch) -> tuple[Tensor, dict[str, list[float]]]:
    """Cross entropy over answer tokens; per task, which answers greedy decoding would give in full.

    A token weighs 1 / sqrt(length of its answer): else the digits of boxes drown the answers of one word.
    """
    at = batch.labels != IGNORE
    target, answer = batch.labels[at], batch.answers[at]
    logits = model.logits(hidden[at]).float()
    weight = torch.bincount(answer).float().rsqrt()[answer]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    right = torch.ones(len(batch.tasks), device=logits.device)
    right = right.scatter_reduce(0, answer, (logits.argmax(-1) == target).float(), "amin")
    exact: dict[str, list[float]] = defaultdict(list)
    names = list(TASK_ID)
    for task, ok in zip(batch.tasks.tolist(), right.tolist(), strict=True):
        exact[names[task]].append(ok)
    return loss, exact


def to_device(batch: Batch, device: torch.device) -> Batch:
    def move(x: object) -> object:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        if isinstance(x, list):
            return [move(y) for y in x]
        return {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x

    return Batch(**{k: move(v) for k, v in vars(batch).items()})  # type: ignore[arg-type]


class Trainer:
    """Everything that a checkpoint holds, and the step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = DemoModel().to(self.device)
        if args.compile:
            for block in (*self.model.visual.blocks, *self.model.model.layers):
                block.compile(dynamic=True)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS, fused=True)
        self.steps = self.pictures = self.since_start = 0
        self.seconds = 0.0
        self.vision_only = True
        self.asked_to_stop = self.stopping = False
        self.unshared_seconds = 0.0  # of this process, since the last step
        self.file = args.run / "state.pt"
        self.tokenizer = build()
        if not self.file.exists() and args.start is not None:
            weights = load_file(args.start / "model.safetensors", device=args.device)
            missing = self.model.load_state_dict(weights, strict=False)
            wrong = [n for n in missing.missing_keys if "_heads." not in n] + missing.unexpected_keys
            if wrong:
                raise ValueError(
                    f"{args.start}: expected this model's tensors; missing or unexpected: {wrong}"
                )
        if self.file.exists():
            state = torch.load(self.file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self.pictures, self.seconds = state["steps"], state["pictures"], state["seconds"]

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / (60 * float(self.args.minutes)))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "pictures": self.pictures,
            "seconds": self.seconds,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)

    def rate(self) -> float:
        cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return float(self.args.rate) * cosine * min(1.0, (self.since_start + 1) / WARM_UP)

    def average(self) -> None:
        """Over the processes: gradients, and what steers the loop, so that all go and stop together."""
        parameters = list(self.model.parameters())
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        state = torch.tensor([self.unshared_seconds, float(self.asked_to_stop)], device=self.device)
        flat = torch.cat([*(g.flatten() for g in grads), state])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        *parts, state = flat.split([*(p.numel() for p in parameters), 2])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
        self.unshared_seconds, self.stopping = float(state[0]), bool(state[1] > 0)

    def step(self, batch: Batch) -> tuple[dict[str, float], dict[str, list[float]]]:
        vision_only = self.progress < self.args.vision_share
        if self.vision_only and not vision_only:
            self.since_start = 0  # the language model warms up too
        self.vision_only = vision_only
        batch = to_device(batch, self.device)
        model = self.model
        exact: dict[str, list[float]] = {}
        seen: dict[str, float] = {}
        dtype = torch.bfloat16
        with torch.autocast(self.device.type, dtype):
            loss = torch.zeros((), device=self.device)
            merged = []
            for pixels, labels in zip(batch.pixels, batch.dense, strict=True):
                patches, cells = model.visual(pixels, dtype)
                merged.append(cells.reshape(len(pixels), -1, cells.shape[-1]))
                grid = (pixels.shape[-3] // data.CELL, pixels.shape[-2] // data.CELL)
                for heads, features in ((model.patch_heads, patches), (model.merged_heads, cells)):
                    helper, accuracy = dense_loss(heads, features, labels, grid)
                    weight = 1.0 if vision_only else self.args.helper
                    loss = loss + weight * helper / len(batch.pixels)
                    seen |= {name: float(v) for name, v in accuracy.items() if not bool(torch.isnan(v))}
            if vision_only:
                seen[f"{batch.kind}_kind"] = seen["merged_kind"]
            seen["helper"] = float(loss.detach())
            if not vision_only:
                hidden = model.hidden(batch.input_ids, merged, batch.position_ids, batch.segments, dtype)
                language, exact = answer_loss(model, hidden, batch)
                seen["loss"] = float(language.detach())
                loss = loss + self.args.language * language
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if dist.is_initialized():
            self.average()
        else:
            self.stopping = self.asked_to_stop
        self.seconds, self.unshared_seconds = self.seconds + self.unshared_seconds, 0.0
        seen["norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        if math.isfinite(seen["norm"]):
            self.optimizer.step()
        self.steps, self.since_start = self.steps + 1, self.since_start + 1
        processes = dist.get_world_size() if dist.is_initialized() else 1
        self.pictures += processes * len(batch.input_ids) * max(1, len(batch.pixels))
        return seen, exact


class Log:
    """Means since the last line, to RUN/log.jsonl and stdout."""

    def __init__(self, run: Path) -> None:
        self.file = run / "log.jsonl"
        self.reset()

    def reset(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.exact: dict[str, list[float]] = defaultdict(list)

    def add(self, seen: dict[str, float], exact: dict[str, list[float]]) -> None:
        for name, value in seen.items():
            self.values[name].append(value)
        for task, ok in exact.items():
            self.exact[task] += ok

    def write(self, trainer: Trainer) -> None:
        line = {
            "minutes": round(trainer.seconds / 60, 2),
            "steps": trainer.steps,
            "pictures": trainer.pictures,
            "rate": float(f"{trainer.rate():.3g}"),
            "exact": {t: round(sum(v) / len(v), 3) for t, v in sorted(self.exact.items())},
            **{name: round(sum(v) / len(v), 3) for name, v in self.values.items()},
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        self.reset()


def batches(trainer: Trainer, progress: Tensor) -> Iterator[Batch]:
    args = trainer.args
    source = Batches(
        Assembler(trainer.tokenizer),
        lambda: stage(float(progress), args.vision_share, args.tokens, args.texts),
        args.seed + trainer.steps + 1_000_000 * args.rank,
    )  # fmt: skip
    return iter(
        DataLoader(
            source, batch_size=None, num_workers=args.workers, prefetch_factor=2 if args.workers else None
        )
    )


def train(args: argparse.Namespace) -> None:
    args.run.mkdir(parents=True, exist_ok=True)
    trainer, log = Trainer(args), Log(args.run)
    progress = torch.tensor(trainer.progress).share_memory_()

    def stop(*_: object) -> None:
        trainer.asked_to_stop = True

    source = batches(trainer, progress)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    last = saved = logged = time.monotonic()
    while trainer.progress < 1 and not trainer.stopping:
        log.add(*trainer.step(next(source)))
        now = time.monotonic()
        trainer.unshared_seconds = min(now - last, LONGEST_STEP)
        last = now
        progress.fill_(trainer.progress)
        if args.rank == 0 and now - logged > LOG_SECONDS:
            log.write(trainer)
            logged = now
        if args.rank == 0 and now - saved > SAVE_SECONDS:
            trainer.save()
            saved = now
    if args.rank == 0:
        trainer.save()


def main() -> None:
    cuda = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the resumable state and the log")
    parser.add_argument("--start", type=Path, help="an exported checkpoint to go on from, in a new RUN")
    parser.add_argument("--minutes", type=float, default=80, help="of training in all, resumed ones included")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--threads", type=int, default=min(cores, 16))
    parser.add_argument(
        "--workers", type=int, default=max(1, cores - 1) if cuda else 1, help="processes that draw"
    )
    parser.add_argument(
        "--tokens", type=int, default=40_000 if cuda else 2_400, help="of a batch, with padding"
    )
    parser.add_argument("--rate", type=float, default=PEAK_RATE)
    parser.add_argument(
        "--helper", type=float, default=0.5, help="weight of the helper losses in the joint phase"
    )
    parser.add_argument("--language", type=float, default=2.0, help="weight of the answers' loss")
    parser.add_argument(
        "--vision-share", type=float, default=0.12, help="share of the time for the tower alone"
    )
    parser.add_argument("--texts", type=float, default=1.0, help="times as many pictures of text")
    parser.add_argument(
        "--compile", action="store_true", help="each block: faster after a minute or two of compiling"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.rank = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(args.threads)
    if "RANK" in os.environ:  # torchrun
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))
    with contextlib.suppress(KeyboardInterrupt):
        train(args)


if __name__ == "__main__":
    main()
