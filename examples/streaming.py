"""An answer as it comes, with settings and what it took: python examples/streaming.py [MODEL.gguf]"""

from __future__ import annotations

import sys

from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.demo.cards import example

with Qwen2VL.from_gguf(sys.argv[1] if len(sys.argv) > 1 else DEMO_MODEL) as m:
    content = [{"type": "image", "image": example(2)[0]}, {"type": "text", "text": "What is in the picture?"}]
    for piece in m.chat([{"role": "user", "content": content}], temperature=0.7, top_p=0.9, seed=1):
        print(piece, end="", flush=True)
    stats = m.last_stats
    print(
        f"\n{stats.image_tokens} tokens of the picture in {stats.encode_seconds:.3f} s, "
        f"{stats.generated_tokens} tokens at {stats.decode_tokens_per_second:.0f} a second"
    )
