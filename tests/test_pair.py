"""One file, and the pair that llama.cpp has: split, merged, and loaded by llama.cpp where it is installed."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from command_line import Run
from conversion import convert, keys_of, stored_bytes
from gguf_files import is_vision, rewritten, split_file, tower_of_2024, u32
from pictures import picture
from qwen2vl_q import DEMO_MODEL, Qwen2VL
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.convert import merge_models, pair_paths, split_model

NAMES = json.loads((Path(__file__).parent / "data" / "llama_cpp_names.json").read_text())
INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the packaged model."""
    folder = tmp_path_factory.mktemp("pair")
    split_model(DEMO_MODEL, folder / "m")
    return pair_paths(folder / "m")


# --- split ----------------------------------------------------------------------------------------


def test_the_halves_are_the_whole(pair: tuple[Path, Path]) -> None:
    assert [path.name for path in pair] == ["m.gguf", "m-mmproj.gguf"]
    whole, halves = stored_bytes(DEMO_MODEL), [stored_bytes(path) for path in pair]
    assert halves[0] | halves[1] == whole
    assert {is_vision(name) for name in halves[0]} == {False}
    assert {is_vision(name) for name in halves[1]} == {True}
    keys = keys_of(DEMO_MODEL)
    assert keys_of(pair[0]) == {k: v for k, v in keys.items() if not k.startswith("clip.")} | {
        "GGUF.kv_count": len(GGUFReader(pair[0]).fields) - 3,
        "GGUF.tensor_count": len(halves[0]),
    }


def test_names_and_keys_are_llama_cpps(tmp_path: Path) -> None:
    """Of both files, against those that llama.cpp's converter wrote."""
    spec = CheckpointSpec(
        hidden_size=256,
        intermediate_size=512,
        mrope_section=(8, 12, 12),
        vocab_size=1280,
        embed_dim=128,
        depth=3,
        rope_theta=1e6,
    )
    convert(write_checkpoint(tmp_path / "Interop", spec), tmp_path / "whole.gguf", "f16")
    split_model(tmp_path / "whole.gguf", tmp_path / "m")
    for path, half in zip(pair_paths(tmp_path / "m"), ("language", "vision"), strict=True):
        reader = GGUFReader(path)
        tensors = {t.name: {"type": t.tensor_type.name, "shape": t.shape.tolist()} for t in reader.tensors}
        assert tensors == NAMES[half]["tensors"]
        found = {n: [t.name for t in f.types] for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        expected = {name: described["types"] for name, described in NAMES[half]["keys"].items()}
        # llama.cpp's tower repeats the language model's defaults of sampling, which nobody reads there.
        gone, own = set(), set()
        if half == "vision":
            gone = {name for name in expected if name.startswith(("general.sampling", "general.size"))}
            own = {f"clip.vision.{n}" for n in ("spatial_merge_size", "image_min_pixels", "image_max_pixels")}
        assert found.keys() - own == expected.keys() - gone
        assert all(found[name] == expected[name] for name in expected.keys() - gone)
        for name in ("general.architecture", "general.type", "general.file_type"):
            assert reader.fields[name].contents() == NAMES[half]["keys"][name]["value"]


def test_the_pair_answers_as_the_whole(pair: tuple[Path, Path]) -> None:
    whole, halves = (Qwen2VL.from_gguf(path, n_threads=1) for path in (DEMO_MODEL, pair[0]))
    assert halves.mmproj == str(pair[1])
    assert halves.config == whole.config and halves.image_processor == whole.image_processor
    np.testing.assert_array_equal(halves.logits([1, 2, 3]), whole.logits([1, 2, 3]))
    image = picture(56, 84)
    np.testing.assert_array_equal(halves.encode_image(image), whole.encode_image(image))


# --- merge ----------------------------------------------------------------------------------------


def test_merged_again_it_is_the_file_that_it_was(
    pair: tuple[Path, Path], tmp_path: Path, tiny_gguf: Path
) -> None:
    merge_models(*pair, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == DEMO_MODEL.read_bytes()
    split_model(tiny_gguf, tmp_path / "tiny")
    merge_models(*pair_paths(tmp_path / "tiny"), tmp_path / "tiny-again.gguf")
    assert (tmp_path / "tiny-again.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_halves_in_parts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    language, tower = (split_file(path, tmp_path / path.stem, 20, path.stem) for path in pair)
    merge_models(language[0], tower[-1], tmp_path / "again.gguf")
    assert stored_bytes(tmp_path / "again.gguf") == stored_bytes(DEMO_MODEL)
    assert not [key for key in keys_of(tmp_path / "again.gguf") if key.startswith("split.")]


def test_another_alignment(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wide = rewritten(pair[0], tmp_path / "wide.gguf", {"general.alignment": u32(256)})
    merge_models(wide, pair[1], tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == DEMO_MODEL.read_bytes()


def test_what_llama_cpps_language_model_does_not_know_goes_with_the_tower(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    """It refuses a file with a tensor more."""
    head = {"head.score.weight": np.ones((1, 64), np.float32)}
    rewritten(tiny_gguf, tmp_path / "m.gguf", added=head)
    split_model(tmp_path / "m.gguf", tmp_path / "half")
    language, tower = (stored_bytes(path) for path in pair_paths(tmp_path / "half"))
    assert "head.score.weight" not in language and "head.score.weight" in tower
    merge_models(*pair_paths(tmp_path / "half"), tmp_path / "again.gguf")
    assert stored_bytes(tmp_path / "again.gguf") == stored_bytes(tmp_path / "m.gguf")


def test_a_tower_of_2024(pair: tuple[Path, Path], tmp_path: Path) -> None:
    old = tower_of_2024(pair[1], tmp_path / "old.gguf")
    merge_models(pair[0], old, tmp_path / "m.gguf")
    assert stored_bytes(tmp_path / "m.gguf") == stored_bytes(pair[0]) | stored_bytes(old)
    first, second = (Qwen2VL.from_gguf(path, n_threads=1) for path in (tmp_path / "m.gguf", DEMO_MODEL))
    image = picture(56, 84)
    np.testing.assert_array_equal(first.encode_image(image), second.encode_image(image))


@pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")
@pytest.mark.parametrize("name", ["Q4_K_M", "Q5_1", "bf16"])
def test_llama_cpps_own_pairs(name: str, tmp_path: Path) -> None:
    language, tower = INTEROP / f"interop-{name}.gguf", INTEROP / "interop-mmproj-q8_0.gguf"
    merge_models(language, tower, tmp_path / "m.gguf")
    assert stored_bytes(tmp_path / "m.gguf") == stored_bytes(language) | stored_bytes(tower)
    split_model(tmp_path / "m.gguf", tmp_path / "again")
    again = pair_paths(tmp_path / "again")
    assert stored_bytes(again[0]) == stored_bytes(language) and stored_bytes(again[1]) == stored_bytes(tower)
    assert keys_of(again[0]) == keys_of(language)
    whole = Qwen2VL.from_gguf(tmp_path / "m.gguf", n_threads=1)
    parts = Qwen2VL.from_gguf(language, n_threads=1, mmproj=tower)
    np.testing.assert_array_equal(whole.logits([1, 2, 3]), parts.logits([1, 2, 3]))
    np.testing.assert_array_equal(whole.encode_image(picture(56, 84)), parts.encode_image(picture(56, 84)))


# --- what is refused ------------------------------------------------------------------------------


def test_halves_that_do_not_fit(pair: tuple[Path, Path], tiny_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    split_model(tiny_gguf, tmp_path / "tiny")
    other = pair_paths(tmp_path / "tiny")[1]
    for model, mmproj, error, message in (
        (pair[0], other, FormatError, "another model's vision tower"),
        (DEMO_MODEL, pair[1], FormatError, "it has a vision tower of its own"),
        (pair[1], pair[1], UnsupportedError, "found a vision tower alone"),
        (pair[0], pair[0], FormatError, "expected a vision tower"),
    ):
        with pytest.raises(error, match=message):
            merge_models(model, mmproj, out)
    with pytest.raises(FormatError, match=r"m\.gguf: it has no vision tower, and none was given"):
        split_model(pair[0], tmp_path / "x")
    assert not out.exists() and not list(tmp_path.glob("x*")) and not list(tmp_path.glob("*.part"))


def test_what_is_there_is_kept(tiny_gguf: Path, tmp_path: Path) -> None:
    for path in pair_paths(tmp_path / "m"):
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            split_model(tiny_gguf, tmp_path / "m")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["precious"]
        path.unlink()
    split_model(tiny_gguf, tmp_path / "m")
    language = pair_paths(tmp_path / "m")[0].read_bytes()
    with pytest.raises(ValueError, match="the file that is read would be overwritten"):
        merge_models(*pair_paths(tmp_path / "m"), tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == language
    (tmp_path / "out.gguf").write_text("precious")
    with pytest.raises(FileExistsError):
        merge_models(*pair_paths(tmp_path / "m"), tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "precious"


@pytest.mark.parametrize("at", [0.1, 0.9])
def test_both_or_none(at: float, tiny_gguf: Path, tmp_path: Path) -> None:
    """Whichever half is being written when it ends."""

    def stop(done: int, total: int) -> None:
        if done > at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split_model(tiny_gguf, tmp_path / "m", progress=stop)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_total(tiny_gguf: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    written = split_model(tiny_gguf, tmp_path / "m", progress=lambda *call: calls.append(call))
    total = sum(t.n_bytes for t in GGUFReader(tiny_gguf).tensors)
    assert calls[-1] == (total, total) and calls == sorted(calls)
    assert [n_bytes for _, n_bytes in written] == [path.stat().st_size for path in pair_paths(tmp_path / "m")]


# --- the commands ---------------------------------------------------------------------------------


def test_the_commands(run: Run, tiny_gguf: Path, tmp_path: Path) -> None:
    prefix, out = tmp_path / "m", tmp_path / "again.gguf"
    language, tower = pair_paths(prefix)
    code, printed, err = run("split", tiny_gguf, prefix)
    sizes = [f"{path}: {path.stat().st_size:,} bytes" for path in (language, tower)]
    assert (code, printed.splitlines(), err) == (0, sizes, "")
    assert run("merge", language, tower, out)[:2] == (0, f"{out}: {out.stat().st_size:,} bytes\n")
    assert out.read_bytes() == tiny_gguf.read_bytes()
    for arguments, message in (
        (("split", tiny_gguf, prefix), "m.gguf exists: pass --force to overwrite it"),
        (("merge", language, tower, out), "again.gguf exists: pass --force to overwrite it"),
        (("split", tiny_gguf, tmp_path / "a.gguf"), "ends in .gguf, which is added"),
        (("split", tiny_gguf, tmp_path / "no" / "m"), "there is no folder"),
        (("merge", language, tower, tmp_path / "m"), "does not end in .gguf"),
    ):
        code, printed, err = run(*arguments)
        assert (code, printed) == (2, "") and message in err and err.count("\n") == 1
    assert run("split", tiny_gguf, prefix, "--force")[0] == 0
    assert run("merge", language, tower, out, "--force")[0] == 0
    code, _, err = run("split", tmp_path / "none.gguf", prefix)
    assert code == 1 and "No such file" in err


# --- llama.cpp ------------------------------------------------------------------------------------


class LlamaCpp:
    """A language model in llama.cpp, on one thread, without a word on stderr."""

    def __init__(self, path: Path) -> None:
        self.api: Any = pytest.importorskip("llama_cpp.llama_cpp", reason="needs llama-cpp-python")
        self._silent = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self._silent, None)
        self.api.llama_backend_init()
        parameters = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(os.fsencode(path), parameters)
        assert self.model

    def log_probabilities(self, ids: list[int]) -> NDArray[np.float64]:
        """[ids, vocabulary]: after each of them."""
        parameters = self.api.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 64, 1, 1
        context = self.api.llama_init_from_model(self.model, parameters)
        n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        rows = []
        for id in ids:
            token = (self.api.llama_token * 1)(id)
            assert self.api.llama_decode(context, self.api.llama_batch_get_one(token, 1)) == 0
            logits = self.api.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(logits, (n_vocab,)).astype(np.float64))
        self.api.llama_free(context)
        return log_softmax(np.stack(rows))

    def close(self) -> None:
        self.api.llama_model_free(self.model)
        self.api.llama_log_set(self.api.llama_log_callback(), None)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


@pytest.fixture(scope="module", params=["q8_0", "f16"])
def sized_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sized")
    spec = CheckpointSpec(hidden_size=256, intermediate_size=512, mrope_section=(8, 12, 12), embed_dim=128)
    convert(write_checkpoint(folder / "checkpoint", spec), folder / "whole.gguf", request.param)
    split_model(folder / "whole.gguf", folder / "m")
    return pair_paths(folder / "m")


@pytest.fixture
def llama_cpp(sized_pair: tuple[Path, Path]) -> Iterator[LlamaCpp]:
    with closing(LlamaCpp(sized_pair[0])) as opened:
        yield opened


def test_llama_cpp_reads_the_language_model(llama_cpp: LlamaCpp, sized_pair: tuple[Path, Path]) -> None:
    """Fed the tokens that we find likeliest. Its activations have 8 bits."""
    ours = Qwen2VL.from_gguf(sized_pair[0], n_threads=1, precision="exact")
    ids = [5, 17, 300, 42, 7, 900, 11, 64]
    for _ in range(16):
        ids.append(int(ours.logits(ids)[-1].argmax()))
    expected = log_softmax(ours.logits(ids).astype(np.float64))
    found = llama_cpp.log_probabilities(ids)
    assert np.sqrt(np.square(found - expected).mean()) < 0.05
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.9


def test_llama_cpp_reads_the_tower(llama_cpp: LlamaCpp, sized_pair: tuple[Path, Path]) -> None:
    """And sees in a picture, of a size that neither resizes, what we see."""
    try:
        from llama_cpp import mtmd_cpp as mtmd
    except (FileNotFoundError, RuntimeError):
        pytest.skip("llama.cpp was built without mtmd")
    image = np.ascontiguousarray(picture(112, 84))
    height, width, _ = image.shape
    expected = Qwen2VL.from_gguf(sized_pair[0], n_threads=1, precision="exact").encode_image(image)
    parameters = mtmd.mtmd_context_params_default()
    parameters.use_gpu = parameters.print_timings = parameters.warmup = False
    parameters.n_threads = 1
    context = mtmd.mtmd_init_from_file(os.fsencode(sized_pair[1]), llama_cpp.model, parameters)
    assert context and mtmd.mtmd_support_vision(context)
    pixels = image.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(mtmd.mtmd_bitmap_init(width, height, pixels))
    marker = mtmd.mtmd_default_marker()
    chunks = mtmd.mtmd_input_chunks_init()
    prompt = mtmd.mtmd_input_text(marker, len(marker), True, True)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
    found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
    (chunk,) = (c for c in found if mtmd.mtmd_input_chunk_get_type(c) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE)
    assert mtmd.mtmd_encode_chunk(context, chunk) == 0
    assert mtmd.mtmd_input_chunk_get_n_tokens(chunk) == len(expected)
    embeddings = np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), expected.shape).copy()
    mtmd.mtmd_free(context)
    assert np.square(embeddings - expected).mean() / expected.var() < 1e-3
