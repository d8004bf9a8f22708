"""One question about one picture: python examples/chat.py [MODEL.gguf PICTURE QUESTION]"""

from __future__ import annotations

import sys
from typing import Any

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo.cards import example

picture: Any
if len(sys.argv) == 4:
    model, picture, question = sys.argv[1:]
else:
    model, (picture, _), question = str(DEMO_MODEL), example(0), "What is in the picture?"

messages = [
    {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}
]
with Qwen2VL.from_gguf(model) as m:
    print(m.chat(messages, stream=False))
