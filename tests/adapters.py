"""LoRA adapters as PEFT saves them (no torch needed)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from checkpoints import Array, write_safetensors

PREFIX = "base_model.model."


def factors(rng: np.random.Generator, name: str, shape: tuple[int, ...], rank: int) -> dict[str, Array]:
    """lora_A and lora_B of a module, by PEFT's names; a convolution's B has its spatial axes, too."""

    def normal(*sizes: int) -> Array:
        return (rng.standard_normal(sizes) / math.sqrt(math.prod(sizes[1:]))).astype(np.float32)

    return {
        f"{PREFIX}{name}.lora_A.weight": normal(rank, *shape[1:]),
        f"{PREFIX}{name}.lora_B.weight": normal(shape[0], rank, *[1] * (len(shape) - 2)),
    }


def write_adapter(folder: Path, tensors: dict[str, NDArray[Any]], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "lora_dropout": 0.05,
        "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
        "layer_replication": None, "target_modules": ["q_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    return folder
