"""Small models that the fuzzer of GGUF files starts from. Usage: make_seeds.py FOLDER"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import CheckpointSpec, write_checkpoint
from conversion import convert
from gguf_files import i32, is_vision, rewritten, split_file, tower_of_2024, u16
from qwen2vl_q.convert import FileType

SPEC = CheckpointSpec(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    embed_dim=16,
    depth=1,
    num_heads=1,
    mlp_ratio=2,
)
ROWS = 8  # of the embedding


def with_few_tokens(model: Path, out: Path) -> Path:
    """The vocabulary is most of a small file, and its items are all alike."""
    writer = GGUFWriter(out, "qwen2vl")
    reader = GGUFReader(model)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "tokenizer.ggml.merges")):
            value = field.contents()
            item = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(
                field.name, value[-ROWS:] if item is not None else value, field.types[0], item
            )
    for tensor in reader.tensors:
        data = tensor.data[:ROWS] if tensor.name == "token_embd.weight" else tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=GGMLQuantizationType(tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_checkpoint(work / "checkpoint", SPEC)
        types: tuple[FileType, ...] = ("f16", "q8_0", "q4_0")
        for type in types:
            convert(work / "checkpoint", work / "whole.gguf", type)
            with_few_tokens(work / "whole.gguf", folder / f"{type}.gguf")
    model = folder / "f16.gguf"
    rewritten(model, folder / "text.gguf", keep=lambda name: not is_vision(name))
    tower = rewritten(model, folder / "tower.gguf", keep=is_vision, architecture="clip")
    tower_of_2024(tower, folder / "tower-2024.gguf")
    rewritten(
        model,
        folder / "part.gguf",
        {"split.no": u16(0), "split.count": u16(1), "split.tensors.count": i32(9)},
    )
    split_file(model, folder, 20, "part")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
