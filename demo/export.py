"""Writes the trained state as a Hugging Face checkpoint: `python -m demo.export --run RUN --out FOLDER`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.model import IMAGE_MEAN, IMAGE_STD, DemoModel, Sizes
from demo.vocabulary import TOKEN_ID, VOCAB_SIZE, build, save

MIN_PIXELS, MAX_PIXELS = 3136, 12845056  # of the released checkpoints


def config(sizes: Sizes) -> dict[str, object]:
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": TOKEN_ID["<|endoftext|>"],
        "eos_token_id": TOKEN_ID["<|im_end|>"],
        "vision_start_token_id": TOKEN_ID["<|vision_start|>"],
        "vision_end_token_id": TOKEN_ID["<|vision_end|>"],
        "vision_token_id": TOKEN_ID["<|vision_pad|>"],
        "image_token_id": TOKEN_ID["<|image_pad|>"],
        "video_token_id": TOKEN_ID["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": 32768,
        "max_window_layers": sizes.num_hidden_layers,
        "model_type": "qwen2_vl",
        "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": sizes.num_key_value_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": sizes.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": sizes.depth,
            "embed_dim": sizes.embed_dim,
            "mlp_ratio": sizes.mlp_ratio,
            "num_heads": sizes.num_heads,
            "in_chans": 3,
            "hidden_size": sizes.hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": list(sizes.mrope_section)},
        "vocab_size": VOCAB_SIZE,
    }


PREPROCESSOR = {
    "min_pixels": MIN_PIXELS,
    "max_pixels": MAX_PIXELS,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
GENERATION = {
    "bos_token_id": TOKEN_ID["<|endoftext|>"],
    "pad_token_id": TOKEN_ID["<|endoftext|>"],
    "do_sample": True,
    "eos_token_id": [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]],
    "repetition_penalty": 1.0,
    "temperature": 0.01,
    "top_p": 0.001,
    "top_k": 1,
}


def export(model: DemoModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config": config(model.sizes),
        "preprocessor_config": PREPROCESSOR,
        "generation_config": GENERATION,
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save(build(), folder)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in model.exported().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    args = parser.parse_args()
    model = DemoModel()
    state = torch.load(args.run / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    export(model, args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.exported().values()):,} parameters")


if __name__ == "__main__":
    main()
