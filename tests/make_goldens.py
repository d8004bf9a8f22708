"""Writes tests/data/goldens.npz: what transformers answers for the shared checkpoint shapes.

Run `python tests/make_goldens.py` with the parity extra installed, after a change of tests/checkpoints.py,
tests/conversations.py or tests/shapes.py; the versions that made the file stand in it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from checkpoints import write_checkpoint
from conversations import conversation
from reference import Reference
from shapes import SHAPES

GOLDENS = Path(__file__).parent / "data" / "goldens.npz"
CHECKPOINT_SEED = 11
# Seed and parts. Sizes that need no resizing: Pillow 13 rounds it otherwise than 12 does.
CONVERSATION = (12, (5, (84, 140), 7, (56, 84), 9))


def main() -> None:
    arrays = {"made_with": np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")}
    c = conversation(*CONVERSATION)
    for name, spec in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            reference = Reference(write_checkpoint(Path(folder), spec, CHECKPOINT_SEED))
            arrays[f"{name}.image"] = reference.encode_image(c.images[0])
            arrays[f"{name}.logits"] = reference.logits(c.token_ids, c.images)[
                ::8
            ]  # every eighth row is enough
    np.savez_compressed(GOLDENS, allow_pickle=False, **arrays)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes, {arrays['made_with']}")


if __name__ == "__main__":
    main()
