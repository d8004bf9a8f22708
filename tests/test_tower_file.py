"""Which file beside a language model is its vision tower."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from conversion import convert
from gguf_files import is_vision, rewritten, split_file, text, tower_of_2024
from pictures import picture
from qwen2vl_q import Qwen2VL
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.engine.tower_file import TowerFile

MODEL = "Qwen2-VL-2B-Instruct-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def halves(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The language model, its tower in two types, and towers that are not its own."""
    folder = tmp_path_factory.mktemp("halves")
    text_only = rewritten(tiny_gguf, folder / "text.gguf", keep=lambda name: not is_vision(name))
    write_checkpoint(folder / "checkpoint", CheckpointSpec(), seed=21)
    write_checkpoint(folder / "other", CheckpointSpec(hidden_size=96, mrope_section=(4, 4, 4)))
    found = {"text": text_only}
    for name, checkpoint, type in (
        ("F16", "checkpoint", "f16"),
        ("Q8_0", "checkpoint", "q8_0"),
        ("wide", "other", "f16"),
    ):
        convert(folder / checkpoint, folder / "whole.gguf", type)  # type: ignore[arg-type]
        found[name] = rewritten(
            folder / "whole.gguf", folder / f"{name}.gguf", keep=is_vision, architecture="clip"
        )
    found["2.5"] = rewritten(
        found["F16"],
        folder / "2.5.gguf",
        {"clip.projector_type": text("qwen2.5vl_merger")},
        architecture="clip",
    )
    found["2024"] = tower_of_2024(found["F16"], folder / "2024.gguf")
    found["damaged"] = folder / "damaged.gguf"
    found["damaged"].write_bytes(found["F16"].read_bytes()[:4000])
    return found


@pytest.fixture
def beside(halves: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Puts files under these names in a folder with the language model."""

    def put(model: str = MODEL, **names: str | Sequence[str]) -> Path:
        shutil.copy(halves["text"], tmp_path / model)
        for kind, given in names.items():
            for name in [given] if isinstance(given, str) else given:
                shutil.copy(halves[kind], tmp_path / name)
        return tmp_path / model

    return put


@pytest.mark.parametrize(
    "name",
    [
        "mmproj-Qwen2-VL-2B-Instruct-f16.gguf",
        "Qwen2-VL-2B-Instruct-mmproj-f16.gguf",
        "Qwen2-VL-2B-Instruct.mmproj-fp16.gguf",
        "Qwen2-VL-2B-Instruct-vision.gguf",
        "qwen2-vl-2b-instruct-vision.gguf",
        "mmproj-model-f16.gguf",
        "mmproj-F16.gguf",
        "mmproj.gguf",
        "MMPROJ.GGUF",
        "qwen2vl-vision.gguf",
        "mmproj-somebody-else.gguf",
    ],
)
def test_usual_names(name: str, beside: Callable[..., Path], halves: dict[str, Path]) -> None:
    model = beside(F16=name, text=["other-model-Q8_0.gguf", "visionary.gguf"])
    found = Qwen2VL.from_gguf(model, n_threads=1)
    assert found.mmproj == str(model.with_name(name)) and found.note == ""
    given = Qwen2VL.from_gguf(model, n_threads=1, mmproj=halves["F16"])
    assert given.mmproj == str(halves["F16"])
    np.testing.assert_array_equal(given.encode_image(picture(56, 56)), found.encode_image(picture(56, 56)))


@pytest.mark.parametrize(
    ("names", "best"),
    [
        ({"F16": ["mmproj-F16.gguf"], "Q8_0": ["mmproj-Q8_0.gguf"]}, "mmproj-F16.gguf"),
        ({"F16": ["mmproj-b.gguf"], "Q8_0": ["mmproj-Qwen2-VL-2B-Instruct-Q8_0.gguf"]}, "mmproj-Qwen2-VL-2B"),
        ({"F16": ["mmproj-b.gguf"], "Q8_0": ["mmproj-Q8_0.gguf"]}, "mmproj-Q8_0.gguf"),
        ({"wide": ["mmproj-Qwen2-VL-2B-Instruct-f16.gguf"], "Q8_0": ["mmproj-b.gguf"]}, "mmproj-b.gguf"),
        ({"2024": ["qwen2vl-vision.gguf"], "2.5": ["mmproj-F16.gguf"]}, "qwen2vl-vision.gguf"),
        ({"damaged": ["mmproj-F16.gguf"], "Q8_0": ["mmproj-Q8_0.gguf"]}, "mmproj-Q8_0.gguf"),
    ],
)
def test_the_best_of_several(names: dict[str, list[str]], best: str, beside: Callable[..., Path]) -> None:
    found = TowerFile.find(str(beside(**names))).path
    assert found is not None and Path(found).name.startswith(best)


@pytest.mark.parametrize(
    "names",
    [
        {"F16": ["mmproj-F16.gguf", "F16-mmproj.gguf"]},
        {"F16": ["mmproj-a.gguf"], "Q8_0": ["mmproj-b.gguf"]},
        {"F16": ["mmproj-F16.gguf"], "2024": ["qwen2vl-vision.gguf"]},
    ],
)
def test_a_choice_is_the_users(names: dict[str, list[str]], beside: Callable[..., Path], run: Run) -> None:
    model = beside(**names)
    listing = ", ".join(sorted(name for group in names.values() for name in group))
    with pytest.raises(ValueError, match="several vision towers beside it") as error:
        Qwen2VL.from_gguf(model)
    assert str(error.value) == f"{model}: several vision towers beside it ({listing}): name one as mmproj"
    code, out, err = run("chat", "-m", model, "-p", "a", "-n", 2)
    assert (code, out) == (1, "") and err == f"error: {error.value}\n"
    assert run("chat", "-m", model, "--no-mmproj", "-p", "a", "-n", 2)[0] == 0
    assert Qwen2VL.from_gguf(model, mmproj=False).config.vision_config is None


def test_what_is_not_its_tower_is_passed_over(beside: Callable[..., Path], run: Run, photo: Path) -> None:
    model = beside(wide="mmproj-F16.gguf", **{"2.5": "Qwen2.5-VL-mmproj.gguf", "damaged": "x-mmproj.gguf"})
    found = Qwen2VL.from_gguf(model, n_threads=1)
    assert found.mmproj is None and found.config.vision_config is None
    for reason in (
        "mmproj-F16.gguf: another model's vision tower: it projects to 96 features, the language model has",
        "Qwen2.5-VL-mmproj.gguf: key 'clip.projector_type': expected 'qwen2vl_merger', found 'qwen2.5vl_mer",
        "x-mmproj.gguf: ",
    ):
        assert f"passed over: {model.parent}/{reason}" in found.note
    with pytest.raises(UnsupportedError, match="no vision tower; give the tower's file as mmproj"):
        found.encode_image(picture(56, 56))
    code, out, err = run("chat", "-m", model, "-p", "Hello", "-n", 2)
    notes = err.splitlines()
    assert code == 0 and out and notes[0] == f"note: {found.note}" and len(notes) == 2
    code, _, err = run("chat", "-m", model, "--image", photo, "-p", "a")
    assert code == 1 and err.endswith(
        "error: this model file has no vision tower; give the tower's file as mmproj\n"
    )


def test_chat_says_which_it_found(beside: Callable[..., Path], run: Run, photo: Path) -> None:
    model = beside(F16="mmproj-F16.gguf")
    question = ["-m", model, "--image", photo, "-p", "a", "-n", 3, "--temp", 0]
    code, out, err = run("chat", *question)
    line = f"vision tower: {model.parent / 'mmproj-F16.gguf'}\n"
    assert code == 0 and err.startswith(line)
    given = run("chat", *question, "--mmproj", model.with_name("mmproj-F16.gguf"))
    assert given == (0, out, err.removeprefix(line))
    code, _, err = run("chat", *question, "--no-mmproj")
    assert code == 1 and "no vision tower" in err
    code, _, err = run("chat", *question, "--no-mmproj", "--mmproj", model)
    assert code == 2 and "--mmproj and --no-mmproj exclude each other" in err


def test_a_model_in_one_file_looks_for_nothing(tiny_gguf: Path, beside: Callable[..., Path]) -> None:
    model = beside(F16=["mmproj-a.gguf", "mmproj-b.gguf"])
    shutil.copy(tiny_gguf, model)
    found = Qwen2VL.from_gguf(model)
    assert found.mmproj is None and found.config.vision_config is not None


def test_split_halves(beside: Callable[..., Path], halves: dict[str, Path], tmp_path: Path) -> None:
    split_file(halves["F16"], tmp_path, 20, "mmproj-F16")
    parts = split_file(halves["text"], tmp_path, 10, "Qwen2-VL-2B")
    for part in (parts[0], parts[-1]):
        found = Qwen2VL.from_gguf(part)
        assert found.mmproj is not None and "mmproj-F16-00001-of-" in found.mmproj
        assert found.config.vision_config is not None


def test_a_half_in_the_others_place(halves: dict[str, Path]) -> None:
    with pytest.raises(FormatError, match="expected a vision tower"):
        Qwen2VL.from_gguf(halves["text"], mmproj=halves["text"])
    with pytest.raises(UnsupportedError, match="found a vision tower alone: pass it as mmproj"):
        Qwen2VL.from_gguf(halves["F16"])


def test_the_tower_type_is_its_content_s(beside: Callable[..., Path], tmp_path: Path) -> None:
    """Names may say what they like."""
    model = beside(F16="mmproj-Q8_0.gguf", Q8_0="mmproj-F16.gguf")
    assert TowerFile.find(str(model)).path == str(tmp_path / "mmproj-Q8_0.gguf")
