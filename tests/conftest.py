"""Fixtures that several files share."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, file_download
from PIL import Image

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from hub_server import HubServer
from pictures import encoded, picture
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.cli.main import main
from qwen2vl_q.convert import Recipe, convert_checkpoint, split_model


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` stands for: many tests have one thread, some two; each worker takes up to a GiB."""
    return min(4, _native.default_thread_count())


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL of a few thousand random weights in one F32 file."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder / "checkpoint", CheckpointSpec(), seed=21)
    convert_checkpoint(folder / "checkpoint", folder / "tiny.gguf", Recipe("f32"))
    return folder / "tiny.gguf"


@pytest.fixture
def tiny(tiny_gguf: Path) -> Qwen2VL:
    """That model, freshly loaded: nothing is left in its caches."""
    return Qwen2VL.from_gguf(tiny_gguf, n_threads=1, n_ctx=2048, precision="exact")


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of 12 visual tokens; its name has a space."""
    path = tmp_path_factory.mktemp("photos") / "a photo.png"
    path.write_bytes(encoded(Image.fromarray(picture(120, 90))))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def only_loopback(host: str, *arguments: Any, resolve: Any = socket.getaddrinfo, **options: Any) -> Any:
    assert host == "127.0.0.1"
    return resolve(host, *arguments, **options)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Nothing but this server is the hub, and caches are the test's own."""
    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # where versions of huggingface_hub have it
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("QWEN2VL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture(scope="session")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), CheckpointSpec(n_shards=2), seed=5)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and files of it: checkpoint/, f32.gguf, and the pair f32-lm.gguf, f32-lm-mmproj.gguf."""
    folder = tmp_path_factory.mktemp("sources")
    spec = CheckpointSpec(hidden_size=256, intermediate_size=512, mrope_section=(8, 12, 12))
    write_checkpoint(folder / "checkpoint", spec, seed=4)
    convert_checkpoint(folder / "checkpoint", folder / "f32.gguf", Recipe("f32"))
    split_model(folder / "f32.gguf", folder / "f32-lm")
    return folder


@pytest.fixture
def demo() -> Qwen2VL:
    return Qwen2VL.from_gguf(DEMO_MODEL, n_threads=2)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of every step that is taken from here on."""
    taken: list[list[int]] = []
    step = _native.step

    def counting(states: Any, rows: Any, progress: Any = None) -> None:
        try:
            step(states, rows, progress)
        finally:
            del states  # an error's traceback would keep them
        taken.append(list(rows))

    monkeypatch.setattr(_native, "step", counting)
    return taken
