"""Accuracy per task on unseen pictures, greedy, with standard errors.

python -m demo.evaluate --via transformers demo/checkpoint
python -m demo.evaluate --via gguf python/qwen2vl_q/data/demo.gguf --per-task 1000
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from demo import cases
from demo.cases import Case

MAX_NEW_TOKENS = 96  # of a form; a box takes 30
FIRST_SEED = 1_000_000
MIN_PIXELS = 4 * 28 * 28  # of a frame: clips as they are; without it they would be enlarged
Answer = Callable[[Sequence[tuple[Case, Sequence[str]]]], list[str]]
"""Cases, each with the answers already given in its conversation -> the next answers."""


def messages(case: Case, given: Sequence[str]) -> list[dict[str, Any]]:
    pictures = [Image.open(io.BytesIO(png)) for png in case.images]
    seen: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    if case.is_clip:
        seen = [{"type": "video", "video": pictures, "min_pixels": MIN_PIXELS}]
    content: list[dict[str, Any]] = [*seen, {"type": "text", "text": case.turns[0].question}]
    out: list[dict[str, Any]] = [{"role": "user", "content": content}]
    for answer, turn in zip(given, case.turns[1:], strict=False):
        out.append({"role": "assistant", "content": answer})
        out.append({"role": "user", "content": turn.question})
    return out


def with_transformers(folder: str) -> Answer:
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    torch.nn.Module.to(model, device)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    pads = model.config.image_token_id, model.config.video_token_id

    def answer(batch: Sequence[tuple[Case, Sequence[str]]]) -> list[str]:
        chats = [messages(case, given) for case, given in batch]
        seen = [part for chat in chats for part in chat[0]["content"]]
        images = [part["image"] for part in seen if part["type"] == "image"]
        videos = [part["video"] for part in seen if part["type"] == "video"]
        inputs: dict[str, Any] = dict(processor(images=images, return_tensors="pt")) if images else {}
        inputs |= video_inputs(videos) if videos else {}
        texts = []
        cells = {
            kind: iter([int(g.prod()) // 4 for g in inputs.get(f"{kind}_grid_thw", [])])
            for kind in ("image", "video")
        }
        for chat in chats:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            texts.append(re.sub(r"<\|(image|video)_pad\|>", lambda m: m[0] * next(cells[m[1]]), text))
        inputs |= tokenizer(texts, padding=True, return_tensors="pt")
        inputs["mm_token_type_ids"] = sum((inputs["input_ids"] == p).int() * k for k, p in enumerate(pads, 1))
        inputs = {k: v.to(device) for k, v in inputs.items()}
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None,
                                 max_new_tokens=MAX_NEW_TOKENS)  # fmt: skip
        new = out[:, inputs["input_ids"].shape[1] :]
        ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
        rows = [row[: row.index(ends)] if ends in row else row for row in new.tolist()]
        return [str(tokenizer.decode(row, skip_special_tokens=False)) for row in rows]

    return answer


def video_inputs(videos: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """Clips for transformers, whose own video processor needs torchvision."""
    import torch

    from qwen2vl_q.vision.image_processor import ImageProcessor
    from qwen2vl_q.vision.video import VideoOptions, process_video

    processor = ImageProcessor()
    clips = [process_video(v, processor, VideoOptions(min_pixels=MIN_PIXELS)) for v in videos]
    return {
        "pixel_values_videos": torch.from_numpy(np.concatenate([processor.patchify(c) for c in clips])),
        "video_grid_thw": torch.tensor([c.grid_thw for c in clips]),
    }


def with_gguf(file: str, precision: Literal["fast", "exact"] = "fast") -> Answer:
    from qwen2vl_q import Qwen2VL

    model = Qwen2VL.from_gguf(file, precision=precision)

    def answer(batch: Sequence[tuple[Case, Sequence[str]]]) -> list[str]:
        return [
            str(model.chat(messages(case, given), stream=False, temperature=0, max_new_tokens=MAX_NEW_TOKENS))
            for case, given in batch
        ]

    return answer


def run(cases: Sequence[Case], answer: Answer, batch_size: int) -> list[str]:
    """The last answer of each case; earlier turns are answered by the model too."""
    given: list[list[str]] = [[] for _ in cases]
    for turn in range(max(len(c.turns) for c in cases)):
        open_cases = [k for k, c in enumerate(cases) if len(c.turns) > turn]
        for start in range(0, len(open_cases), batch_size):
            part = open_cases[start : start + batch_size]
            for k, text in zip(part, answer([(cases[k], given[k]) for k in part]), strict=True):
                given[k].append(text)
    return [texts[-1] for texts in given]


@dataclass(frozen=True)
class Accuracy:
    right: int
    questions: int

    @classmethod
    def of(cls, asked: Sequence[Case], answers: Sequence[str]) -> Accuracy:
        return cls(sum(cases.right(c.turns[-1], a) for c, a in zip(asked, answers, strict=True)), len(asked))

    @property
    def value(self) -> float:
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.questions)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint folder or a GGUF file")
    parser.add_argument("--via", choices=("transformers", "gguf"), required=True)
    parser.add_argument("--per-task", type=int, default=1000)
    parser.add_argument("--tasks", nargs="+", choices=cases.TASKS, default=list(cases.TASKS))
    parser.add_argument("--batch-size", type=int, default=50, help="with transformers")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task, on stderr")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    answer = (with_transformers if args.via == "transformers" else with_gguf)(args.model)
    figures = {}
    print("| task | accuracy | standard error | questions |\n|---|---|---|---|")
    for task in args.tasks:
        start = time.monotonic()
        asked = [cases.case(task, FIRST_SEED + k) for k in range(args.per_task)]
        answers = run(asked, answer, args.batch_size)
        wrong = [(c, a) for c, a in zip(asked, answers, strict=True) if not cases.right(c.turns[-1], a)]
        for c, a in wrong[: args.show]:
            print(
                f"{task}: {c.turns[-1].question} expected {c.turns[-1].answer!r}, got {a!r}", file=sys.stderr
            )
        found = Accuracy.of(asked, answers)
        figures[task] = {
            "accuracy": found.value,
            "standard_error": found.standard_error,
            "questions": found.questions,
            "seconds": time.monotonic() - start,
        }
        print(f"| {task} | {found.value:.3f} | {found.standard_error:.3f} | {found.questions} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
