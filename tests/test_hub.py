"""Models by name, against a hub on loopback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hub_server import HubServer, Repository
from qwen2vl_q import FormatError, Qwen2VL, UnsupportedError
from qwen2vl_q.hub.cache import Cache
from qwen2vl_q.hub.models import Models
from qwen2vl_q.hub.names import HubName

NAME = "Qwen/Qwen2-VL-Tiny"
CONFIG = json.dumps({"model_type": "qwen2_vl"}).encode()


def get(name: str = NAME, **options: bool) -> tuple[Path, Path | None, list[str]]:
    told: list[str] = []
    entry = Models(tell=told.append).get(HubName.parse(name), **options)
    return Path(entry.model), Path(entry.mmproj) if entry.mmproj else None, told


def pair(*types: str, towers: tuple[str, ...] = ("f16",)) -> Repository:
    """Files of 10 KB whose content is their name."""
    names = [f"Tiny-{type}.gguf" for type in types] + [f"mmproj-Tiny-{type}.gguf" for type in towers]
    return Repository({name: name.encode() * 500 for name in names})


# --- files in GGUF ---


def test_a_gguf_with_its_tower(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories[NAME] = repository = pair("Q4_K_M", "Q8_0", towers=("Q8_0", "f16"))
    model, mmproj, told = get()
    assert model.read_bytes() == repository.files["Tiny-Q4_K_M.gguf"]
    assert mmproj and mmproj.read_bytes() == repository.files["mmproj-Tiny-f16.gguf"]
    assert hub.downloads() == ["Tiny-Q4_K_M.gguf", "mmproj-Tiny-f16.gguf"]
    (line,) = told
    assert f"{NAME}, Q4_K_M: fetching 2 files, 0.0 MB" in line and str(tmp_path / "hub") in line


def test_a_second_time_needs_no_network(hub: HubServer) -> None:
    hub.repositories[NAME] = pair("Q4_K_M", "Q8_0")
    first = get()[:2]
    n_requests = len(hub.requests)
    assert get() == (*first, [])
    assert get(f"hf:{NAME}:q4_k_m") == (*first, [])
    assert get(f"{NAME}:Tiny-Q4_K_M.gguf") == (*first, [])
    assert len(hub.requests) == n_requests
    hub.close()
    assert get(local_files_only=True) == (*first, [])
    hub._server.server_close = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("types", "chosen"),
    [
        (("Q2_K", "Q4_0", "Q8_0", "Q4_K_M"), "Q4_K_M"),
        (("Q2_K", "Q4_0", "Q8_0", "Q4_K_S"), "Q4_0"),
        (("Q2_K", "Q5_K_M", "Q8_0"), "Q8_0"),
        (("Q2_K", "f16-longest", "Q5_K_M-long", "IQ4_XS-longer"), "Q5_K_M-long"),
        (("Q2_K", "Q3_K_M-long"), "Q3_K_M-long"),
        (("Q4_0_4_4", "Q5_1"), "Q5_1"),
        (("imatrix", "Q5_1"), "Q5_1"),
        (("Instruct",), "Instruct"),
    ],
)
def test_the_type_where_none_is_named(hub: HubServer, types: tuple[str, ...], chosen: str) -> None:
    hub.repositories[NAME] = pair(*types)
    assert get()[0].name == f"Tiny-{chosen}.gguf"


def test_a_split_file_comes_whole(hub: HubServer) -> None:
    parts = {f"Q4_K_M/Tiny-Q4_K_M-0000{i}-of-00003.gguf": b"part" * 2000 + bytes([i]) for i in (1, 2, 3)}
    hub.repositories[NAME] = Repository({**parts, "mmproj-F16.gguf": b"tower"})
    model, mmproj, _ = get()
    assert model.name == "Tiny-Q4_K_M-00001-of-00003.gguf"
    assert [path.name for path in sorted(model.parent.iterdir())] == [Path(name).name for name in parts]
    assert mmproj and mmproj.name == "mmproj-F16.gguf"
    (entry,) = Cache().entries()
    assert entry.size == 3 * 8001 + 5


def test_a_split_file_with_a_part_missing(hub: HubServer) -> None:
    hub.repositories[NAME] = Repository({"Tiny-Q4_0-00001-of-00002.gguf": b"x"})
    with pytest.raises(FormatError, match="Tiny-Q4_0: expected 2 parts in the repository, found 1"):
        get()


def test_a_type_that_is_not_there(hub: HubServer) -> None:
    hub.repositories[NAME] = pair("Q4_K_M", "Q8_0")
    with pytest.raises(FileNotFoundError, match=r"has no Q5_0; it has Q8_0 \(0\.0 MB\), Q4_K_M \(0\.0 MB\)"):
        get(f"{NAME}:Q5_0")
    assert hub.downloads() == []


def test_several_files_of_a_type(hub: HubServer) -> None:
    hub.repositories[NAME] = Repository({"2B-Q4_0.gguf": b"small", "7B-Q4_0.gguf": b"large"})
    with pytest.raises(ValueError, match="has 2 files of Q4_0: name one of 2B-Q4_0, 7B-Q4_0"):
        get()
    assert get(f"{NAME}:7B-Q4_0")[0].read_bytes() == b"large"


def test_revisions_are_kept_apart(hub: HubServer) -> None:
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), revisions=("main", "refs/pr/1", "v1"))
    get()
    n_requests = len(hub.requests)
    get(f"{NAME}@v1")
    assert any("/revision/v1" in path for _, path, _ in hub.requests[n_requests:])
    with pytest.raises(FileNotFoundError, match=f"{NAME} has no revision 'v2'"):
        get(f"{NAME}:Q4_0@v2")
    assert {entry.revision for entry in Cache().entries()} == {None, "v1"}


def test_pull_sees_a_newer_version(hub: HubServer) -> None:
    hub.repositories[NAME] = pair("Q4_0")
    old = get()[0]
    hub.repositories[NAME].files["Tiny-Q4_0.gguf"] = b"newer" * 2000
    assert get()[0] == old
    told: list[str] = []
    Models(tell=told.append).pull(HubName.parse(NAME))
    assert "the version before, " in told[1]
    assert get()[0].read_bytes() == b"newer" * 2000
    hub.repositories[NAME].files["Tiny-Q4_K_M.gguf"] = b"better" * 2000
    Models().pull(HubName.parse(NAME))
    assert get()[0].name == "Tiny-Q4_K_M.gguf"
    assert get(f"{NAME}:Q4_0")[0].read_bytes() == b"newer" * 2000
    assert len(Cache().entries()) == 2


def test_a_cached_file_that_was_cut_is_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories[NAME] = repository = pair("Q4_0")
    model = get()[0]
    model.write_bytes(b"short")
    shutil.rmtree(tmp_path / "cache")
    assert get()[0].read_bytes() == repository.files["Tiny-Q4_0.gguf"]


def test_a_folder_and_a_token_of_the_caller(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[NAME] = Repository(checkpoint_files, revisions=("main", "v1"))
    options: dict[str, Any] = {
        "quantization": "f32",
        "revision": "v1",
        "cache_dir": tmp_path / "own",
        "n_threads": 1,
    }
    Qwen2VL.from_pretrained(NAME, **options, token="hf_secret").close()
    assert hub.tokens == {"Bearer hf_secret"}
    assert {path.name for path in tmp_path.iterdir()} == {"own"}
    assert [path.name for path in (tmp_path / "own").rglob("*.gguf")] == ["Qwen2-VL-Tiny-F32.gguf"]
    assert "hf_secret" not in "".join(p.read_text() for p in (tmp_path / "own" / "models").rglob("*.json"))
    hub.repositories.clear()
    with Qwen2VL.from_pretrained(
        f"{NAME}:F32@v1", local_files_only=True, cache_dir=tmp_path / "own"
    ) as model:
        assert model.generate([5], max_new_tokens=1)


# --- checkpoints ---


def test_a_checkpoint_is_converted_once(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[NAME] = Repository({**checkpoint_files, "README.md": b"#", "flax_model.msgpack": b"x"})
    progress: list[tuple[str, int, int]] = []
    told: list[str] = []
    models = Models(tell=told.append, progress=lambda *step: progress.append(step))
    entry = models.get(HubName.parse(NAME))
    assert Path(entry.model).is_relative_to(tmp_path / "cache") and entry.type == "Q4_0"
    assert f"converting to Q4_0, once: {entry.model}" in told[1]
    assert progress[-1][0] == "convert" and progress[-1][1] == progress[-1][2]
    assert not {"README.md", "flax_model.msgpack"} & set(hub.downloads())
    n_requests = len(hub.requests)
    with Qwen2VL.from_pretrained(NAME, n_threads=1) as model:
        assert model.config.vision_config is not None
    assert get()[2] == [] and len(hub.requests) == n_requests
    other = Models().get(HubName.parse(f"{NAME}:f16"))
    assert other.type == "F16" and hub.downloads().count("model-00001-of-00002.safetensors") == 1


def test_a_type_that_a_checkpoint_does_not_become(hub: HubServer, checkpoint_files: dict[str, bytes]) -> None:
    hub.repositories[NAME] = Repository({**checkpoint_files, "Tiny-Q5_K_M.gguf": b"x"})
    assert get()[0].name == "Tiny-Q5_K_M.gguf"
    with pytest.raises(
        FileNotFoundError, match=r"has no Q9_9; it has Q5_K_M .*, its checkpoint converts to Q4_0, Q4_1"
    ):
        get(f"{NAME}:Q9_9")
    assert get(f"{NAME}:q8_0")[0].name == "Qwen2-VL-Tiny-Q8_0.gguf"


def test_a_conversion_that_fails_leaves_nothing(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories[NAME] = Repository(dict(checkpoint_files))
    with monkeypatch.context() as patch:
        patch.setattr("qwen2vl_q.convert.convert.quantize", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            get()
    assert [path.name for path in (tmp_path / "cache" / "models").rglob("*") if path.is_file()] == []
    n_downloads = len(hub.downloads())
    get()
    assert len(hub.downloads()) == n_downloads


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            r"'llama' \(\['LlamaForCausalLM'\]\)",
        ),
        ({"model_type": "qwen2_5_vl"}, "'qwen2_5_vl'"),
    ],
)
def test_a_repository_that_is_something_else(hub: HubServer, config: dict[str, object], found: str) -> None:
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"x" * 9000}
    for repository in (Repository(files), Repository({**files, "a-Q4_0.gguf": b"x"})):
        hub.repositories[NAME] = repository
        with pytest.raises(UnsupportedError, match=f"{NAME} is {found}, not Qwen2-VL"):
            get()
    assert set(hub.downloads()) == {"config.json"}


def test_a_gguf_of_something_else(hub: HubServer) -> None:
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), gguf={"architecture": "qwen3vl"})
    with pytest.raises(UnsupportedError, match=f"{NAME} is qwen3vl, not Qwen2-VL"):
        get()
    assert hub.downloads() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"#"}, "holds neither GGUF files nor a checkpoint in safetensors"),
        ({"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"}, "holds an adapter, not"),
        ({"model.safetensors": b"x"}, "holds no config.json, not"),
        (
            {"model.safetensors": b"x", "config.json": b'{"model_type": "qwen2_vl", "hidden_size": -1}'},
            "hidden_size",
        ),
    ],
)
def test_a_repository_without_a_model(hub: HubServer, files: dict[str, bytes], message: str) -> None:
    hub.repositories[NAME] = Repository(files)
    with pytest.raises((UnsupportedError, FormatError), match=message):
        get()
    assert "model.safetensors" not in hub.downloads()


def test_a_config_that_is_none(hub: HubServer) -> None:
    hub.repositories[NAME] = Repository({"config.json": b"[1]", "model.safetensors": b"x"})
    with pytest.raises(FormatError, match="expected a JSON object, found list"):
        get()
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), declared={"config.json": 2**30})
    hub.repositories[NAME].files["config.json"] = CONFIG
    with pytest.raises(FormatError, match=r"config\.json: expected at most 1048576 bytes, found 1073741824"):
        get()


def test_a_transfer_that_breaks_goes_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repositories[NAME] = repository = pair("Q4_0")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    repository.cut["Tiny-Q4_0.gguf"] = [1000, 2000]
    assert get()[0].read_bytes() == repository.files["Tiny-Q4_0.gguf"]
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith("/Tiny-Q4_0.gguf")]
    assert ranges[0] is None and ranges[1:] == ["bytes=1000-", "bytes=3000-"]


def test_a_transfer_that_stays_broken(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repositories[NAME] = repository = pair("Q4_0")
    repository.cut["mmproj-Tiny-f16.gguf"] = [0] * 20
    with pytest.raises(ConnectionError, match="hub cannot be reached: "):
        get()
    assert Cache().entries() == []
    repository.cut.clear()
    assert get()[1] is not None
    assert hub.downloads().count("Tiny-Q4_0.gguf") == 1


def test_a_wrong_checksum(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories[NAME] = repository = pair("Q4_0")
    repository.corrupt.add("Tiny-Q4_0.gguf")
    with pytest.raises(
        OSError, match=r"Tiny-Q4_0\.gguf: expected SHA-256 \w{64}, found \w{64}: what came is"
    ):
        get()
    assert Cache().entries() == []
    assert list((tmp_path / "hub").rglob("*.gguf")) == []
    repository.corrupt.clear()
    assert get()[0].read_bytes() == repository.files["Tiny-Q4_0.gguf"]


def test_a_wrong_size(hub: HubServer) -> None:
    hub.repositories[NAME] = repository = pair("Q4_0")
    repository.declared["Tiny-Q4_0.gguf"] = 7
    with pytest.raises(OSError, match=r"Tiny-Q4_0\.gguf: expected 7 bytes, found 7000: what came is damaged"):
        get()


@pytest.mark.parametrize("size", [-1, 2**60, True, "7"])
def test_sizes_that_are_none(hub: HubServer, size: object) -> None:
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), declared={"Tiny-Q4_0.gguf": size})
    with pytest.raises(FormatError, match="expected its size in bytes"):
        get()


def test_no_space(
    hub: HubServer, checkpoint_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(5e9))
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), declared={"Tiny-Q4_0.gguf": 6 * 10**9})
    message = r"no space: 6\.0 GB are needed, the disk of .* has 5\.0 GB left"
    with pytest.raises(OSError, match=message):
        get()
    declared = {"model-00001-of-00002.safetensors": 4 * 10**9}
    hub.repositories["o/c"] = Repository(checkpoint_files, declared=declared)
    with pytest.raises(OSError, match=r"o/c: no space: 5\.5 GB are needed"):  # 1.5 of them for the result
        get("o/c")
    assert set(hub.downloads()) == {"config.json"}


@pytest.mark.parametrize(
    ("refusal", "error", "message"),
    [
        ((401, "GatedRepo"), PermissionError, "is gated: accept its terms at http.*, then log in .*HF_TOKEN"),
        ((403, "GatedRepo"), PermissionError, "is gated"),
        ((403, ""), PermissionError, "the hub refuses this login: .*403"),
        (
            (401, "RepoNotFound"),
            FileNotFoundError,
            "is no file here, and the Hugging Face hub has no such repos",
        ),
        ((500, ""), OSError, "the hub does not deliver: .*500"),
    ],
)
def test_refusals(hub: HubServer, refusal: tuple[int, str], error: type[OSError], message: str) -> None:
    hub.repositories[NAME] = dataclasses.replace(pair("Q4_0"), refusal=refusal)
    with pytest.raises(error, match=message) as raised:
        get()
    assert "\n" not in str(raised.value)


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=f"{NAME}: the .* hub cannot be reached: .*; the cache does not have it"
    ):
        get()


def test_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.repositories[NAME] = pair("Q4_0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match=f"{NAME}: HF_HUB_OFFLINE forbids to ask the hub; the cache does not"
    ):
        get()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="local_files_only forbids"):
        get(local_files_only=True)
    found = get()[:2]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get()[:2] == found
    shutil.rmtree(tmp_path / "cache")  # what the hub's own cache has is found again
    assert get()[:2] == found
    assert get(local_files_only=True)[:2] == found
    with pytest.raises(FileNotFoundError, match="has no Q8_0"):
        get(f"{NAME}:Q8_0")


@pytest.mark.parametrize(
    "name",
    [
        "../../out-Q4_0.gguf",
        "/tmp/out-Q4_0.gguf",
        "a/../../out-Q4_0.gguf",
        "out\0-Q4_0.gguf",
        "C:\\out-Q4_0.gguf",
    ],
)
def test_names_that_lead_elsewhere(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.repositories[NAME] = Repository({name: b"evil", "good-Q8_0.gguf": b"good"})
    assert get()[0].read_bytes() == b"good"
    assert hub.downloads() == ["good-Q8_0.gguf"]
    with pytest.raises(FileNotFoundError, match="it has Q8_0"):
        get(f"{NAME}:Q4_0")
