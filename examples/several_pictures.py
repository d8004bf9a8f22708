"""Several pictures in one question, and a question after it: python examples/several_pictures.py [MODEL.gguf]

The packaged model knows drawn cards alone, one at a time: give a real model for answers that make sense.
"""

from __future__ import annotations

import sys
from typing import Any

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo.cards import example

with Qwen2VL.from_gguf(sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL) as m:
    pictures = [{"type": "image", "image": example(seed)[0]} for seed in (0, 1)]
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": [*pictures, {"type": "text", "text": "What is in the pictures?"}]}
    ]
    # Numbered for the model: "Picture 1: ", "Picture 2: ".
    answer = m.chat(talk, stream=False, add_vision_id=True, max_new_tokens=64)
    print(answer)
    talk += [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "How many shapes are there?"},
    ]
    print(m.chat(talk, stream=False, add_vision_id=True, max_new_tokens=64))
    # The pictures and the first turn were found again: neither was computed a second time.
    print(f"{m.last_stats.reused_tokens} of {m.last_stats.prompt_tokens} tokens were there already")
