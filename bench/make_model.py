"""Writes a GGUF of a real Qwen2-VL's shape with random weights and a synthetic vocabulary.

Speed and memory do not depend on what the weights say, so they can be measured without the real ones.
Answers are noise. Run `python bench/make_model.py --help`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from qwen2vl_q._native import quantize
from qwen2vl_q.checkpoint.tensor_map import MappedTensor, Role, map_tensors
from qwen2vl_q.convert.config import read_config
from qwen2vl_q.convert.entries import ARCHITECTURE, Entry
from qwen2vl_q.convert.metadata import metadata
from qwen2vl_q.convert.recipe import FILE_TYPES, FileType, Recipe, TextShape, type_for_row
from qwen2vl_q.convert.tokenizer_files import read_tokenizer
from qwen2vl_q.convert.writer import OutputTensor, write_gguf

SHAPES: dict[str, dict[str, object]] = {
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
_N_BASE_TOKENS = 151643
_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TILE_ROWS = 256  # random rows that a matrix repeats; quantizing all of them would take minutes


def write_checkpoint_files(folder: Path, shape: dict[str, object]) -> None:
    """The JSON files of a checkpoint folder, without the weights."""

    def write(name: str, content: object) -> None:
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    ids = {token: _N_BASE_TOKENS + i for i, token in enumerate(_SPECIALS)}
    write(
        "config.json",
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "torch_dtype": "float16",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "max_position_embeddings": 32768,
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_config": {"hidden_size": shape["hidden_size"]},
            **shape,
        },
    )
    write("generation_config.json", {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    write(
        "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )
    write(
        "tokenizer_config.json",
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "added_tokens_decoder": {
                str(id): {"content": token, "special": True} for token, id in ids.items()
            },
        },
    )
    # The 256 bytes as GPT-2 spells them, one merge (a file needs some), then words that no text contains.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    tokens = [*letters, "th"]
    tokens += [f"\u0120synthetic{i}" for i in range(len(tokens), _N_BASE_TOKENS)]
    write("vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n", encoding="utf-8")


def random_rows(tensor: MappedTensor, output: OutputTensor) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes: normal values of variance 1 / fan-in; norm weights near 1, biases near 0.

    They depend on the name alone: every file and type has the same weights.
    """
    rng = np.random.default_rng(zlib.crc32(output.name.encode()))
    shape = output.shape
    rows, cols = (1, shape[0]) if len(shape) == 1 else (shape[0], math.prod(shape[1:]))
    if tensor.role is Role.VECTOR:
        offset = 1.0 if output.name.endswith("weight") else 0.0
        values = rng.normal(offset, 0.02, (rows, cols)).astype(np.float32)
        yield quantize(values, output.type)
        return
    values = rng.normal(0, 1 / math.sqrt(cols), (min(rows, TILE_ROWS), cols)).astype(np.float32)
    tile = quantize(values, output.type)
    for start in range(0, rows, len(tile)):
        yield np.ascontiguousarray(tile[: rows - start])


@dataclass(frozen=True)
class RandomModel:
    """A model of a shape before it is written."""

    entries: list[Entry]
    tensors: dict[str, tuple[MappedTensor, OutputTensor]]

    @classmethod
    def of(cls, size: str, recipe: Recipe) -> RandomModel:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint_files(Path(folder), SHAPES[size])
            config = read_config(Path(folder))
            tokenizer = read_tokenizer(Path(folder), config)
            tensors: dict[str, tuple[MappedTensor, OutputTensor]] = {}
            all_mapped = map_tensors(config)
            text = TextShape.of({name: m.target_shape for m in all_mapped for name in m.targets})
            for mapped in all_mapped:
                shape = mapped.target_shape
                for name in mapped.targets:
                    type = type_for_row(recipe.wanted(mapped.role, name, text), shape[-1])
                    tensors[name] = mapped, OutputTensor(name, type, shape)
            n_parameters = sum(output.n_elements for _, output in tensors.values())
            name = f"Qwen2-VL {size} shape, random weights"
            return cls(metadata(name, config, recipe.type, tokenizer, n_parameters), tensors)

    def write(self, out: Path, architecture: str = ARCHITECTURE) -> int:
        """Returns the file's size in bytes."""
        outputs = [output for _, output in self.tensors.values()]
        return write_gguf(
            out,
            self.entries,
            outputs,
            lambda output: random_rows(self.tensors[output.name][0], output),
            True,
            None,
            architecture,
        )

    def language_model(self) -> RandomModel:
        """The half that llama.cpp's main loader reads: it refuses tensors that it does not know."""
        return RandomModel(
            [entry for entry in self.entries if not entry.key.startswith("clip.")],
            {name: tensor for name, tensor in self.tensors.items() if not _is_vision(name)},
        )

    def vision_tower(self) -> RandomModel:
        """The half that llama.cpp calls mmproj; its architecture is "clip"."""
        kept = ("clip.", "general.name", "general.file_type", "general.quantization_version")
        entries = [Entry("general.type", "mmproj", GGUFValueType.STRING)]
        entries += [
            entry
            for entry in self.entries
            if entry.key.startswith(kept) and not entry.key.endswith("_pixels")  # not in the hub's files
        ]
        tensors = {name: tensor for name, tensor in self.tensors.items() if _is_vision(name)}
        return RandomModel(entries, tensors)


def _is_vision(name: str) -> bool:
    return name.startswith(("v.", "mm."))


@click.command(help=__doc__)
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", type=click.Choice(list(SHAPES)), default="2b", show_default=True)
@click.option("--type", "type_", type=click.Choice(FILE_TYPES), default="q4_0", show_default=True)
@click.option(
    "--vision-type", type=click.Choice(FILE_TYPES), help="Of the vision tower, where it should differ."
)
def main(out: Path, size: str, type_: FileType, vision_type: FileType | None) -> None:
    n_bytes = RandomModel.of(size, Recipe(type_, vision_type)).write(out)
    print(f"{out}: {n_bytes / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
