"""Many conversations at once, as a server has them: python examples/many_at_once.py [MODEL.gguf]

Their tokens are computed together; what they have in common is computed once.
"""

from __future__ import annotations

import asyncio
import sys

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo.cards import example

QUESTIONS = ["What is in the picture?", "How many shapes are there?", "Who are you?"]


async def ask(m: Qwen2VL, seed: int, question: str) -> str:
    content = [{"type": "image", "image": example(seed)[0]}, {"type": "text", "text": question}]
    return await m.achat([{"role": "user", "content": content}], stream=False, max_new_tokens=64)


async def main(path: str) -> None:
    with Qwen2VL.from_gguf(path) as m:
        asked = [(seed, question) for seed in range(4) for question in QUESTIONS]
        answers = await asyncio.gather(*(ask(m, *case) for case in asked))
        for (seed, question), answer in zip(asked, answers, strict=True):
            print(f"card {seed}: {question} {answer}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else str(DEMO_MODEL)))
