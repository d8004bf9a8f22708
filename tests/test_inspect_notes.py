"""inspect: what a file lacks, and what of it is slow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from qwen2vl_q import _native
from qwen2vl_q.convert import Recipe, convert_checkpoint, split_model


def without(source: Path, out: Path, *keys: str) -> Path:
    """A copy that lacks some keys."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", *keys)):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def notes(run: Run, path: Path | str) -> tuple[list[str], list[str]]:
    code, out, err = run("inspect", path, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    return found["lacks"], found["slow"]


def test_a_whole_quantized_model_has_none(run: Run) -> None:
    assert notes(run, "demo") == ([], [])
    assert "Lacks" not in run("inspect", "demo")[1]


def test_missing_keys_and_what_counts_instead(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    keys = ("tokenizer.chat_template", "clip.vision.image_m", "general.sampling.")
    bare = without(tiny_gguf, tmp_path / "bare.gguf", *keys)
    assert notes(run, bare)[0] == [
        "no chat template: Qwen2-VL's own counts",
        "no defaults of sampling: answers are greedy",
        "no bounds of pictures: the released 3,136 to 12,845,056 pixels count",
    ]
    out = run("inspect", bare)[1]
    assert "\nLacks\n no chat template: " in out


def test_halves_of_a_model(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    (language, _), (tower, _) = split_model(tiny_gguf, tmp_path / "pair")
    assert notes(run, language)[0] == [f"no vision tower in it, but beside it: {tower}"]
    assert notes(run, tower)[0] == ["no language model: it is a vision tower alone"]
    tower.rename(tmp_path / "tower.bin")
    assert notes(run, language)[0] == ["no vision tower in it, and none beside it: texts alone"]


@pytest.mark.parametrize(("type", "bits"), [("f32", 32), ("bf16", 16)])
def test_unquantized_matrices_are_slow(run: Run, tmp_path: Path, type: str, bits: int) -> None:
    write_checkpoint(tmp_path / "c", CheckpointSpec(tie_word_embeddings=False), seed=1)
    recipe = Recipe("q8_0" if type == "bf16" else "f32", "bf16" if type == "bf16" else None)
    convert_checkpoint(tmp_path / "c", tmp_path / "m.gguf", recipe)
    slow = notes(run, tmp_path / "m.gguf")[1]
    tower = f"{type.upper()}: 14 matrices of the vision tower are multiplied in float32"
    if type == "bf16":
        assert slow == [tower]
        return
    language = (
        f"{type.upper()}: 15 matrices of the language model are multiplied in float32, "
        f"and every token reads {bits} bits a weight of them"
    )  # seven a layer and the head: of embeddings a row is read
    assert slow == [language, tower]
    assert f"\nSlow here\n {language}\n" in run("inspect", tmp_path / "m.gguf")[1]


def test_types_and_machines_without_kernels(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "qwen2vl")
    data = np.zeros((1, 50), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=GGMLQuantizationType.IQ1_S)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(_native, "supported_isas", lambda: ["generic"])
    assert notes(run, tmp_path / "m.gguf") == (
        ["no kernels of this build for IQ1_S (tensors: 1): it cannot be loaded"],
        ["no kernels for this processor's vectors: plain C++ computes everything"],
    )
