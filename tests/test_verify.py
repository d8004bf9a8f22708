"""verify: what is the same is found the same, what is worse by how much, what is damaged by its name."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.convert import Recipe, convert_checkpoint, convert_gguf, split_model
from qwen2vl_q.measure import divergence
from qwen2vl_q.measure.conversations import built_in
from qwen2vl_q.measure.verify import Thresholds, Verification, verify

STRICT = Thresholds(tensor_error=1e-9, cosine=1.0, kl=1e-6, agreement=1.0)
LOOSE = Thresholds()
DAMAGED = "blk.2.ffn_down.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("reference"), CheckpointSpec(dtype="BF16"), seed=21)


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "m.gguf"
    convert_checkpoint(checkpoint, out, Recipe("bf16"))
    return out


@pytest.fixture(scope="module")
def q4_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("q4") / "demo-q4_0.gguf"
    convert_gguf(Path(DEMO_MODEL), None, out, Recipe("q4_0"))
    return out


def changed(source: Path, out: Path, name: str, change: Callable[[NDArray[np.uint8]], None]) -> Path:
    """A copy with a tensor's bytes changed."""
    shutil.copyfile(source, out)
    (tensor,) = (t for t in _native.GgufFile(source).tensors if t.name == name)
    change(np.memmap(out, np.uint8, "r+", tensor.offset, (tensor.n_bytes,)))
    return out


def flip_signs(data: NDArray[np.uint8]) -> None:
    data.reshape(-1, 34)[:, 1] ^= 0x80  # Q8_0: of the scales


def require_equal(found: Verification) -> None:
    assert not any(tensor.relative for tensor in found.tensors)
    assert all(picture.cosine == pytest.approx(1, abs=1e-12) for picture in found.pictures)
    assert (found.divergence.mean, found.divergence.p99, found.divergence.agreement) == (0, 0, 1)


def test_a_file_is_itself() -> None:
    found = verify(DEMO_MODEL, DEMO_MODEL, precision="exact")
    require_equal(found)
    assert len(found.pictures) == 8
    assert found.divergence.tokens > 500
    assert len(found.tensors) == len(_native.GgufFile(DEMO_MODEL).tensors)
    assert found.failures(LOOSE) == []


def test_fast_is_told_apart_from_the_weights() -> None:
    found = verify(DEMO_MODEL, DEMO_MODEL)
    assert not any(tensor.relative for tensor in found.tensors)
    assert 0 < found.divergence.mean < found.divergence.p99 < 0.1
    assert found.failures(LOOSE) == []


def test_a_quantized_file_passes_and_fails_by_threshold(q4_demo: Path) -> None:
    found = verify(q4_demo, DEMO_MODEL)
    assert found.failures(LOOSE) == []
    failed = " ".join(found.failures(STRICT))
    assert all(
        what in failed for what in ("tensor blk.0.", "picture card", "KL divergence", "same likeliest")
    )
    errors = {tensor.type: tensor.relative for tensor in found.tensors}
    assert 1e-3 < errors["Q4_0"] < 2e-2  # of normal values, 8 steps to the largest
    assert errors["F32"] == 0


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    damaged = changed(DEMO_MODEL, tmp_path / "m.gguf", DAMAGED, flip_signs)
    found = verify(damaged, DEMO_MODEL)
    assert [tensor.name for tensor in found.tensors if tensor.relative] == [DAMAGED]
    assert found.worst[0].relative == pytest.approx(4)  # (-x - x)^2 / x^2
    assert found.failures(LOOSE)[0].startswith(f"tensor {DAMAGED}: relative squared error 4, allowed 0.1")
    assert any("KL divergence" in line for line in found.failures(LOOSE))


def test_what_is_not_finite_fails(checkpoint: Path, converted: Path, tmp_path: Path, run: Run) -> None:
    def poison(data: NDArray[np.uint8]) -> None:
        data.view("<u2")[5] = 0x7FC0

    damaged = changed(converted, tmp_path / "m.gguf", "blk.1.attn_q.weight", poison)
    code, out, _ = run("verify", damaged, checkpoint, "--json", "--min-agreement", 0)
    assert code == 1
    found = json.loads(out, parse_constant=pytest.fail)
    (bad,) = (t for t in found["tensors"] if t["relative_squared_error"] != 0)
    assert (bad["name"], bad["relative_squared_error"]) == ("blk.1.attn_q.weight", None)
    assert found["kl_mean"] is None
    assert any("KL divergence inf" in line for line in found["failures"])


def test_a_checkpoint_is_the_reference(
    checkpoint: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    require_equal(verify(converted, checkpoint, precision="exact"))
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_the_file_that_it_was(converted: Path, tmp_path: Path) -> None:
    (language, _), (tower, _) = split_model(converted, tmp_path / "pair")
    require_equal(verify(language, converted, precision="exact"))  # the tower beside it
    require_equal(verify(converted, language, reference_mmproj=tower, precision="exact"))


def test_language_models_alone_are_asked_texts(converted: Path, tmp_path: Path) -> None:
    (language, _), (tower, _) = split_model(converted, tmp_path / "pair")
    tower.rename(tmp_path / "elsewhere.bin")
    found = verify(language, language, precision="exact")
    require_equal(found)
    assert (found.pictures, len(list(built_in(pictures=False)))) == ([], 4)
    with pytest.raises(ValueError, match=r"pair.gguf: no vision tower in it or beside it; .*m.gguf has one"):
        verify(language, converted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            CheckpointSpec(hidden_size=128, mrope_section=(4, 6, 6)),
            "hidden_size: expected the reference's 128, found 64",
        ),
        (CheckpointSpec(depth=3), "vision tower: depth: expected the reference's 3, found 2"),
        (CheckpointSpec(rope_theta=1e6), "rope_theta: expected the reference's 1000000.0, found 100.0"),
    ],
)
def test_other_models_are_refused_before_any_work(
    spec: CheckpointSpec,
    message: str,
    converted: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen2vl_q.measure.verify.opened", pytest.fail)
    code, out, err = run("verify", converted, write_checkpoint(tmp_path, spec))
    assert (code, out) == (1, "")
    assert err == f"error: {converted}: {message}\n"


def test_another_vocabulary_is_refused(converted: Path, tmp_path: Path, run: Run) -> None:
    tokens = _native.GgufFile(converted).metadata["tokenizer.ggml.tokens"]
    index, token = next((i, t) for i, t in enumerate(tokens) if i > 700 and len(t) == 5 and t.isascii())
    other = tmp_path / "m.gguf"
    stored = len(token).to_bytes(8, "little") + token.encode()
    data = converted.read_bytes()
    at = data.index(stored) + 8
    other.write_bytes(data[:at] + b"#q7#?" + data[at + 5 :])
    code, _, err = run("verify", other, converted)
    assert (code, err) == (
        1,
        f"error: {other}: token {index}: expected the reference's '{token}', found '#q7#?'\n",
    )


def test_what_differs_beside_the_weights_is_noted(converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "m.gguf"
    data = converted.read_bytes()
    assert data.count(b"You are a helpful assistant.") == 1
    other.write_bytes(data.replace(b"You are a helpful assistant.", b"You are a hopeless assistant"))
    found = verify(other, converted, conversations=list(built_in(pictures=False)), precision="exact")
    require_equal(found)
    assert found.notes == ["another chat template than the reference's, by which both were asked"]


def test_ctrl_c_leaves_no_file(
    checkpoint: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[Path] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "weights":
            seen.extend(tmp_path.rglob("*.gguf"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(converted, checkpoint, progress=interrupt)
    assert [path.name for path in seen] == ["reference.gguf"]
    assert list(tmp_path.iterdir()) == []


# --- the command ---


def test_exit_codes_and_verdicts(q4_demo: Path, run: Run) -> None:
    code, out, err = run("verify", q4_demo, "demo")
    assert (code, err) == (0, "")
    assert "The file keeps to every threshold." in out
    assert "| language model matrix | Q4_0 | Q8_0      | 28    |" in out
    code, out, _ = run("verify", q4_demo, "demo", "--max-kl", "1e-6", "--precision", "exact")
    assert code == 1
    assert "differs: KL divergence" in out
    for wrong in (
        ["--max-kl", "nan"],
        ["--precision", "loose"],
        ["--images", "nowhere"],
        ["--min-cosine", 2],
    ):
        assert run("verify", q4_demo, "demo", *wrong)[0] == 2


def test_json_has_everything(q4_demo: Path, run: Run) -> None:
    code, out, _ = run("verify", q4_demo, "demo", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        *("model", "mmproj", "reference", "precision", "isa", "tensors", "pictures", "tokens", "kl_mean"),
        *("kl_p99", "same_likeliest", "notes", "thresholds", "failures", "passes"),
    ]
    assert list(found["tensors"][0]) == [
        *("name", "role", "type", "reference_type", "parameters", "relative_squared_error"),
    ]
    assert list(found["pictures"][0]) == ["name", "tokens", "cosine"]
    assert found["thresholds"] == vars(Thresholds())
    assert (found["passes"], found["failures"], found["precision"]) == (True, [], "fast")
    assert 0 < found["kl_mean"] < found["kl_p99"]


def test_pictures_of_a_folder(photo: Path, tmp_path: Path, run: Run) -> None:
    shutil.copy(photo, tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    code, out, _ = run(
        "verify", "demo", "demo", "--images", tmp_path, "--tokens", 5, "--precision", "exact", "--json"
    )
    found = json.loads(out)
    assert (code, [picture["name"] for picture in found["pictures"]]) == (0, ["b.png"])
    assert 0 < found["tokens"] <= 5  # the reference's own
    (tmp_path / "b.png").unlink()
    assert run("verify", "demo", "demo", "--images", tmp_path)[0] == 1


def test_conversations_of_files(photo: Path, tmp_path: Path, run: Run) -> None:
    talk = tmp_path / "talk.json"
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(photo)}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "1 shape."},
    ]
    talk.write_text(json.dumps(messages))
    code, out, _ = run("verify", "demo", "demo", "--conversation", talk, "--precision", "exact", "--json")
    tokenize = Qwen2VL.from_gguf(DEMO_MODEL).tokenize
    found = json.loads(out)
    assert (code, len(found["pictures"]), found["kl_mean"]) == (0, 1, 0)
    assert found["tokens"] == sum(len(tokenize(text)) + 1 for text in ("A red circle.", "1 shape."))


# --- arithmetic ---


def test_divergence_by_hand() -> None:
    p, q = (
        np.log(np.array(x, np.float32)) + 3 for x in ([[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]])
    )
    found = divergence.Divergence.of([divergence.compare(p, q)])
    assert found.mean == pytest.approx(0.25 * np.log(3))
    assert found.p99 == pytest.approx(0.5 * np.log(3))
    assert (found.tokens, found.agreement) == (2, 0.5)
    bad = q.copy()
    bad[0, 0] = np.nan
    assert divergence.Divergence.of([divergence.compare(p, bad)]).mean == np.inf


def test_log_softmax_of_large_logits() -> None:
    found = divergence.log_softmax(np.array([[1e4, 1e4 - np.log(3)]], np.float32))
    assert np.allclose(found, np.log([[0.75, 0.25]]), atol=1e-3)  # float32 steps by 0.001 there
    assert np.allclose(np.exp(found).sum(-1), 1)
