"""Writes a random checkpoint of a real Qwen2-VL's shape and converts it to OpenVINO's 4 bits, for peers.py.

Takes a few minutes, over 12 GB of memory and three times that checkpoint's 4.4 GB of disk (2B). peers.py
--help says how the packages that convert are installed. A real checkpoint is converted by the same command:

\b
  optimum-cli export openvino --task image-text-to-text --weight-format int4 --model CHECKPOINT OUT
"""

from __future__ import annotations

import json
import math
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from make_model import SHAPES, TILE_ROWS, write_checkpoint_files
from qwen2vl_q.checkpoint.tensor_map import MappedTensor, Role, map_tensors
from qwen2vl_q.convert.config import read_config


def random_pieces(tensor: MappedTensor) -> Iterator[NDArray[np.float16]]:
    """The tensor's values, as random as make_model.random_rows()."""
    rng = np.random.default_rng(zlib.crc32(tensor.source.encode()))
    shape = tensor.source_shape
    if tensor.role is Role.VECTOR:
        yield rng.normal(float(tensor.source.endswith("weight")), 0.02, shape).astype(np.float16)
        return
    rows, cols = shape[0], math.prod(shape[1:])
    tile = rng.normal(0, 1 / math.sqrt(cols), (min(rows, TILE_ROWS), cols)).astype(np.float16)
    for start in range(0, rows, len(tile)):
        yield tile[: rows - start]


def write_checkpoint(folder: Path, size: str) -> None:
    write_checkpoint_files(folder, SHAPES[size])
    tensors = map_tensors(read_config(folder))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * math.prod(tensor.source_shape)
        header[tensor.source] = {"dtype": "F16", "shape": tensor.source_shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for piece in random_pieces(tensor):
                file.write(piece.tobytes())


@click.command(help=__doc__)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--optimum-cli", default="optimum-cli", show_default=True, help="The command that converts.")
@click.option("--size", type=click.Choice(list(SHAPES)), default="2b", show_default=True)
def main(out: Path, optimum_cli: str, size: str) -> None:
    with tempfile.TemporaryDirectory() as checkpoint:
        write_checkpoint(Path(checkpoint), size)
        options = ["--task", "image-text-to-text", "--weight-format", "int4", "--model", checkpoint]
        subprocess.run([optimum_cli, "export", "openvino", *options, str(out)], check=True)


if __name__ == "__main__":
    main()
