"""Names of the hub on the command line: pull, list, rm, -m; and what exists under such a name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from command_line import PROGRAM, Run
from gguf_files import is_vision, rewritten
from hub_server import HubServer, Repository
from qwen2vl_q import Qwen2VL
from qwen2vl_q.hub.cache import Cache
from qwen2vl_q.hub.models import Models
from qwen2vl_q.hub.names import HubName
from qwen2vl_q.measure.benchmark import Settings

NAME = "Qwen/Qwen2-VL-Tiny"


@pytest.fixture(scope="session")
def pair(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny model in two files, as llama.cpp has it."""
    folder = tmp_path_factory.mktemp("pair")
    language = rewritten(tiny_gguf, folder / "Tiny-F32.gguf", keep=lambda name: not is_vision(name))
    tower = rewritten(tiny_gguf, folder / "mmproj-Tiny-F32.gguf", keep=is_vision, architecture="clip")
    return {path.name: path.read_bytes() for path in (language, tower)}


def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """Of a process whose hub is this server."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home = {"HF_HOME": str(tmp_path / "hf"), "QWEN2VL_CACHE": str(tmp_path / "cache")}
    return {**given, **home, "HF_ENDPOINT": hub.endpoint}


def test_a_question_about_a_picture(hub: HubServer, run: Run, pair: dict[str, bytes], photo: Path) -> None:
    hub.repositories[NAME] = Repository(pair)
    question = ("--image", photo, "-p", "What?", "-n", 5, "--temp", 0)
    code, out, err = run("chat", "-m", NAME, *question)
    assert code == 0 and f"{NAME}, F32: fetching 2 files" in err
    hub.repositories.clear()
    assert run("chat", "-m", f"hf:{NAME}:f32", *question)[:2] == (0, out)
    code, out, _ = run("inspect", NAME, "--json")
    assert code == 0 and json.loads(out)["type"] == "F32"


def test_a_bench_takes_the_tower(
    hub: HubServer, run: Run, pair: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def measure(settings: Settings, tell: object) -> None:
        taken.append((Path(settings.model).name, Path(settings.mmproj or "").name))
        raise OSError("enough")

    monkeypatch.setattr("qwen2vl_q.cli.bench_run._in_own_process", measure)
    monkeypatch.setattr("qwen2vl_q.cli.bench_run.Runner._limits", lambda self, tell: None)
    hub.repositories[NAME] = Repository(pair)
    assert run("bench", "-m", NAME)[0] == 1
    assert taken == [("Tiny-F32.gguf", "mmproj-Tiny-F32.gguf")]


def test_pull_list_rm(hub: HubServer, run: Run, pair: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository({**pair, "Tiny-Q8_0.gguf": b"x" * 20_000_000})
    code, out, err = run("pull", NAME)
    assert code == 0 and "Q8_0: fetching 2 files" in err
    assert [Path(line).name for line in out.splitlines()] == ["Tiny-Q8_0.gguf", "mmproj-Tiny-F32.gguf"]
    assert run("pull", f"{NAME}:F32")[0] == 0
    code, out, err = run("list")
    assert code == 0 and err == ""
    assert re.search(rf"{NAME} +Q8_0 +2\d\.\d MB +20\d\d-\d\d-\d\d \d\d:\d\d +/.*Tiny-Q8_0\.gguf", out)
    listed = json.loads(run("list", "--json")[1])
    assert [entry["type"] for entry in listed] == ["F32", "Q8_0"]
    assert listed[1]["size"] == 20_000_000 + len(pair["mmproj-Tiny-F32.gguf"])
    assert Path(listed[1]["mmproj"]).is_file() and not listed[1]["converted"]
    assert run("rm", f"{NAME}:Q4_0", "--yes") == (
        1,
        "",
        f"error: {NAME}:Q4_0 is not in the cache; it has {NAME}:F32, {NAME}:Q8_0\n",
    )
    assert run("rm", f"{NAME}:Q8_0")[0] == 2  # nobody to ask
    assert run("rm", f"{NAME}:Q8_0", "--yes") == (0, f"removed {NAME}:Q8_0\n", "")
    blobs = [path.stat().st_size for path in (tmp_path / "hub").rglob("blobs/*")]
    assert sorted(blobs) == sorted(map(len, pair.values()))  # the tower is the other's too
    assert run("rm", NAME, "--yes")[1] == f"removed {NAME}:F32\n"
    assert not list((tmp_path / "hub").rglob("blobs/*"))
    assert run("list")[1] == "" and run("list", "--json")[1] == "[]\n"


def test_rm_keeps_what_another_revision_shares(hub: HubServer, run: Run, pair: dict[str, bytes]) -> None:
    files = {"Tiny-Q4_0.gguf": b"same" * 2000, "Tiny-Q8_0.gguf": b"other" * 2000}
    hub.repositories[NAME] = repository = Repository({**pair, **files}, revisions=("main", "v1"))
    shared = Path(run("pull", f"{NAME}:Q4_0@v1")[1].splitlines()[0])
    repository.files["README.md"] = b"another commit"
    for type in ("Q4_0", "Q8_0"):
        run("pull", f"{NAME}:{type}@main")
    assert run("rm", f"{NAME}:Q4_0@main", "--yes") == (0, f"removed {NAME}:Q4_0@main\n", "")
    assert shared.read_bytes() == files["Tiny-Q4_0.gguf"]
    assert [str(entry.name) for entry in Cache().entries()] == [f"{NAME}:Q4_0@v1", f"{NAME}:Q8_0@main"]


def test_rm_asks(hub: HubServer, run: Run, pair: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME] = Repository(pair)
    run("pull", NAME)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt: "n")
    code, out, err = run("rm", NAME)
    assert code == 130 and out == "" and re.search(r"Tiny-F32\.gguf  \d\.\d MB\n", err)
    assert len(Cache().entries()) == 1
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda prompt: "y")
    assert run("rm", NAME)[:2] == (0, f"removed {NAME}:F32\n")
    assert Cache().entries() == []


def test_rm_of_a_converted_model(
    hub: HubServer, run: Run, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[NAME] = Repository(checkpoint_files)
    model = Path(run("pull", NAME)[1].strip())
    assert model.is_file() and run("pull", f"{NAME}:f16")[0] == 0
    assert run("rm", f"{NAME}:Q4_0", "--yes")[0] == 0
    assert not model.exists() and [entry.type for entry in Cache().entries()] == ["F16"]
    assert run("rm", NAME, "--yes")[0] == 0
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    assert not list((tmp_path / "hub").rglob("blobs/*"))


def test_rm_stays_inside_its_cache(
    hub: HubServer, run: Run, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[NAME] = Repository(checkpoint_files)
    run("pull", NAME)
    precious = tmp_path / "precious.gguf"
    precious.write_text("kept")
    (record,) = (tmp_path / "cache").rglob("*.json")
    values = json.loads(record.read_text())
    for changes in ({"snapshot": "/"}, {"snapshot": str(tmp_path)}, {"downloads": ["../../precious.gguf"]}):
        record.write_text(json.dumps({**values, **changes}))
        assert Cache().entries() == []
    record.write_text(json.dumps({**values, "model": str(precious)}))
    assert run("rm", NAME, "--yes")[0] == 0
    assert precious.exists() and not record.exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"repository": 1}', "[" * 100_000, "9" * 5000])
def test_records_that_are_none(hub: HubServer, run: Run, pair: dict[str, bytes], content: str) -> None:
    hub.repositories[NAME] = Repository(pair)
    run("pull", NAME)
    (record,) = Cache().folder.rglob("*.json")
    record.write_text(content)
    assert run("list", "--json")[:2] == (0, "[]\n")
    assert run("pull", NAME)[0] == 0
    assert len(json.loads(run("list", "--json")[1])) == 1


@pytest.mark.parametrize(
    "name", ["", "a", "hf:a", "a/b/c", "a/b:", "a/b@", "../b", "a..b/c", "a/b:c:d", "a/b:\x1b"]
)
def test_names_that_are_none(hub: HubServer, run: Run, name: str) -> None:
    code, out, err = run("pull", name)
    assert (code, out) == (2, "") and "expected owner/name[:TYPE][@REVISION], found" in err
    if name.startswith("hf:"):
        code, out, err = run("chat", "-m", name, "-p", "a")
        assert (code, out) == (1, "") and "expected owner/name" in err
    assert hub.requests == []


def test_what_exists_is_no_name(
    hub: HubServer, run: Run, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    shutil.copy(tiny_gguf, tmp_path / NAME)
    assert run("inspect", NAME)[0] == 0
    Qwen2VL.from_pretrained(NAME, n_threads=1).close()
    with pytest.raises(OSError, match="No such file"):
        Qwen2VL.from_pretrained("some/missing.gguf")
    assert hub.requests == []


def test_completion(hub: HubServer, pair: dict[str, bytes], tmp_path: Path) -> None:
    hub.repositories[NAME] = Repository(pair)
    given = environment(hub, tmp_path)
    subprocess.run([*PROGRAM, "pull", NAME], env=given, check=True, capture_output=True)
    n_requests = len(hub.requests)
    for words, expected in (
        ("qwen2vl-q rm Qw", f"plain,{NAME}:F32\n"),
        ("qwen2vl-q inspect Qw", f"file,Qw\nplain,{NAME}:F32\n"),
        ("qwen2vl-q chat -m Qwen/Other --top", "plain,--top-k\nplain,--top-p\n"),  # and fetches nothing
    ):
        shell = {
            "_QWEN2VL_Q_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run(PROGRAM, env={**given, **shell}, capture_output=True, text=True, check=True)
        assert done.stdout == expected
    assert len(hub.requests) == n_requests


def test_two_processes_convert_once(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path
) -> None:
    """This one holds the lock until the other waits for it, and converts meanwhile."""
    hub.repositories[NAME] = Repository(checkpoint_files)
    given = environment(hub, tmp_path)
    models, name = Models(), HubName.parse(NAME)
    command = [*PROGRAM, "chat", "-m", NAME, "-p", "a", "-n", "1"]
    with subprocess.Popen(command, env=given, stderr=subprocess.PIPE, text=True) as other:
        assert other.stderr is not None
        with models.cache.lock(NAME, print):
            client = models._hub()
            models._obtain(client, client.listing(NAME, None), name)
            n_requests = len(hub.requests)
            (record,) = models.cache.folder.rglob("*.json")
            hidden = record.rename(record.with_suffix(".hidden"))
            assert "waiting for another process" in other.stderr.readline()
            hidden.rename(record)
        assert "converting" not in other.stderr.read()
    assert other.returncode == 0 and len(hub.requests) == n_requests


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, f"interrupted: {NAME} is not fetched\n"), (signal.SIGTERM, 143, "")],
)
def test_an_interrupted_conversion_leaves_nothing(
    hub: HubServer, checkpoint_files: dict[str, bytes], tmp_path: Path, number: int, code: int, message: str
) -> None:
    hub.repositories[NAME] = Repository(checkpoint_files)
    script = (
        "import os, sys, qwen2vl_q.convert.convert as module; from qwen2vl_q.cli.main import main;"
        f"module.quantize = lambda *arguments: os.kill(os.getpid(), {int(number)});"
        f"sys.exit(main(['pull', '{NAME}']))"
    )
    command = [PROGRAM[0], "-c", script]
    done = subprocess.run(
        command, env=environment(hub, tmp_path), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and done.stderr.endswith(message) and done.stdout == ""
    assert [path.name for path in (tmp_path / "cache" / "models").rglob("*") if path.is_file()] == []
