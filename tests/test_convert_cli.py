"""The commands convert and inspect."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from gguf import GGUFWriter

from checkpoints import CheckpointSpec, write_checkpoint
from hub_server import HubServer, Repository
from qwen2vl_q.base.errors import FormatError, Qwen2VLError
from qwen2vl_q.cli.convert import convert
from qwen2vl_q.cli.inspect import inspect
from qwen2vl_q.convert import Recipe, convert_checkpoint


def run(command: object, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("c") / "Small-Model", CheckpointSpec())


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("m") / "m.gguf"
    convert_checkpoint(checkpoint, out, Recipe("q4_0"))
    return out


def test_convert_prints_a_table_and_the_fallbacks(checkpoint: Path, tmp_path: Path) -> None:
    result = run(convert, checkpoint, tmp_path / "m.gguf", "--type", "q4_0")
    assert result.exit_code == 0
    size = (tmp_path / "m.gguf").stat().st_size
    assert f"m.gguf: {size:,} bytes" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["language", "model", "matrix", "Q4_0", "14", "86,016", "0.0", "4.50"] in rows
    assert ["embedding", "or", "head", "Q8_0", "1", "66,560", "0.1", "8.50"] in rows
    assert "Q8_0 instead of Q6_K: 1 of embedding or head, rows of 64" in result.stdout


def test_types_in_any_case(checkpoint: Path, tmp_path: Path) -> None:
    assert (
        run(convert, checkpoint, tmp_path / "upper.gguf", "--type", "Q8_0", "--vision-type", "BF16").exit_code
        == 0
    )
    assert (
        run(convert, checkpoint, tmp_path / "lower.gguf", "--type", "q8_0", "--vision-type", "bf16").exit_code
        == 0
    )
    assert (tmp_path / "upper.gguf").read_bytes() == (tmp_path / "lower.gguf").read_bytes()


def test_nothing_on_stderr_where_it_is_no_terminal(checkpoint: Path, tmp_path: Path) -> None:
    assert run(convert, checkpoint, tmp_path / "m.gguf").stderr == ""


def test_control_characters_do_not_reach_the_terminal(checkpoint: Path, tmp_path: Path) -> None:
    odd = "a\x1b[2Jb"
    folder = tmp_path / odd
    for arguments in (
        (checkpoint, folder / "m.gguf"),
        (checkpoint, tmp_path / odd),
        (folder, tmp_path / "m.gguf"),
        (checkpoint, tmp_path / f"{odd}.gguf"),
        (checkpoint, tmp_path / f"{odd}.gguf"),  # which exists now
    ):
        output = run(convert, *arguments).output
        assert "\x1b" not in output
        assert r"a\x1b[2Jb" in output


def test_convert_usage_errors(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    for arguments, message in (
        ((checkpoint, tmp_path / "m.safetensors"), "does not end in .gguf"),
        ((checkpoint, tmp_path / "no" / "m.gguf"), "there is no folder"),
        ((tmp_path / "nothing", out), "is neither a folder nor a GGUF file"),
        ((checkpoint, out, "--type", "q9_0"), "q9_0"),
        ((checkpoint, out, "--vision-type", "x"), "--vision-type"),
        ((checkpoint,), "OUT.gguf"),
    ):
        result = run(convert, *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.stderr
    out.write_text("precious")
    result = run(convert, checkpoint, out)
    assert result.exit_code == 2
    assert "exists: pass --force" in result.stderr
    assert out.read_text() == "precious"
    assert run(convert, checkpoint, out, "--force").exit_code == 0


def test_convert_fetches_a_name_of_the_hub(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories["Qwen/Qwen2-VL-Tiny"] = Repository(checkpoint_files)
    result = run(convert, "Qwen/Qwen2-VL-Tiny", tmp_path / "m.gguf")
    assert result.exit_code == 0, result.exception
    assert "Qwen2 VL Tiny" in run(inspect, tmp_path / "m.gguf").stdout
    assert run(convert, "hf:Qwen/Qwen2-VL-Tiny@main", tmp_path / "m.gguf", "--force").exit_code == 0
    result = run(convert, "Qwen/Qwen2-VL-Tiny:Q8_0", tmp_path / "m.gguf", "--force")
    assert result.exit_code == 2 and "the type of OUT.gguf is --type's" in result.stderr


def test_convert_refuses_what_is_no_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["a/b"] = Repository({"a-Q4_0.gguf": b"x"})
    for name, message in (
        ("a/b", "a/b holds GGUF files and no checkpoint in safetensors"),
        ("a/none", "a/none is no file here, and the Hugging Face hub has no such repository"),
    ):
        result = run(convert, name, tmp_path / "m.gguf")
        assert message in str(result.exception)
    assert hub.downloads() == []


def test_inspect(model: Path) -> None:
    text = run(inspect, model).stdout
    for expected in (
        "qwen2vl.block_count",
        "Small Model",
        "1024 normal, 14 control, 2 unused",
        "Q4_0",
        "image_max_pixels",
    ):
        assert expected in text
    assert re.search(r": GGUF version 3, \d+ tensors, mostly Q4_0, \d+\.\d\d bits a weight\n", text)
    assert "1026 <|im_end|>" in text
    assert "blk.1.ffn_up.weight" not in text
    assert "blk.1.ffn_up.weight" in run(inspect, model, "--tensors").stdout


def test_inspect_json(model: Path) -> None:
    everything = json.loads(run(inspect, model, "--json").stdout)
    assert everything["metadata"]["qwen2vl.embedding_length"] == 64
    assert len(everything["metadata"]["tokenizer.ggml.tokens"]) == 1040
    assert sum(t["parameters"] for t in everything["types"]) == everything["parameters"]
    assert sum(t["bytes"] for t in everything["types"]) == sum(t["bytes"] for t in everything["tensors"])
    # Of the language model's layers: the vision tower, in Q8_0, has more weights here.
    assert everything["type"] == "Q4_0"
    n_bytes = sum(t["bytes"] for t in everything["types"])
    assert everything["bits_per_weight"] == 8 * n_bytes / everything["parameters"]
    q4 = next(t for t in everything["types"] if t["type"] == "Q4_0")
    assert (q4["tensors"], q4["bits_per_weight"]) == (14, 4.5)
    embedding = next(t for t in everything["tensors"] if t["name"] == "token_embd.weight")
    assert embedding["shape"] == [1040, 64]


def test_inspect_template(model: Path) -> None:
    template = run(inspect, model, "--template").stdout
    assert template.startswith("{% set image_count")
    assert template.rstrip().endswith("{% endif %}")


def test_inspect_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    writer = GGUFWriter(path, "gpt2")
    writer.add_array("tokenizer.ggml.tokens", ["[a]", "b"])
    writer.add_name("[red]\x1b[2J")  # neither markup nor terminal codes
    writer.add_uint32("tokenizer.ggml.eos_token_id", 7)  # out of range: shown as the number it is
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    result = run(inspect, path)
    assert result.exit_code == 0
    assert "0 tensors" in result.stdout
    assert r"[red]\x1b[2J" in result.stdout
    assert "Weights" not in result.stdout
    assert [line.split() for line in result.stdout.splitlines() if "eos" in line] == [["eos_token_id", "7"]]
    assert json.loads(run(inspect, path, "--json").stdout)["tensors"] == []
    assert isinstance(run(inspect, path, "--template").exception, Qwen2VLError | ValueError)


def test_inspect_refuses_what_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("not a model")
    result = run(inspect, path)
    assert isinstance(result.exception, FormatError)
    assert isinstance(run(inspect, tmp_path / "nothing.gguf").exception, OSError | Qwen2VLError)
