"""The engine without torch: goldens, instruction sets, precisions, reuse, cancelling, llama.cpp's answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from conversations import IMAGE_PAD, VIDEO_PAD, Parts, conversation, encoded_patches, random_image
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.base.errors import Qwen2VLError, UnsupportedError
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint
from qwen2vl_q.vision.image_processor import preprocess
from shapes import SHAPES

GOLDENS = Path(__file__).parent / "data" / "goldens.npz"
GOLDEN_SEED, GOLDEN_CONVERSATION = 11, (12, (5, (84, 140), 7, (56, 84), 9))  # as in make_goldens.py
INTEROP = Path(__file__).resolve().parents[2] / "shared" / "interop"
MOSTLY_Q4_0 = 2  # general.file_type
FloatArray = NDArray[np.float32]
Precision = Literal["fast", "exact"]

# Widths that K-quants divide too, so that every type is really used.
WIDE = CheckpointSpec(
    hidden_size=256, intermediate_size=512, mrope_section=(8, 12, 12), embed_dim=128, num_heads=2
)


def make_model(folder: Path, spec: CheckpointSpec, type: FileType, seed: int = GOLDEN_SEED) -> Path:
    out = folder / "model.gguf"
    convert_checkpoint(write_checkpoint(folder / "checkpoint", spec, seed), out, Recipe(type))
    return out


@pytest.fixture(scope="module", params=["q4_0", "q8_0", "f16", "bf16", "f32"])
def wide_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("wide"), WIDE, request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VL:
    return Qwen2VL.from_gguf(make_model(tmp_path_factory.mktemp("model"), WIDE, "q8_0"), n_threads=2)


@pytest.fixture(scope="module")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Qwen2VL:
    """In the fast precision the rows that go through together decide which channels are outliers."""
    return Qwen2VL.from_gguf(make_model(tmp_path_factory.mktemp("exact"), WIDE, "q8_0"), precision="exact")


def cosines(values: FloatArray, reference: FloatArray) -> FloatArray:
    """Per row."""
    products = (values * reference).sum(-1)
    return np.asarray(products / np.linalg.norm(values, axis=-1) / np.linalg.norm(reference, axis=-1))


def nmse(values: FloatArray, reference: FloatArray) -> float:
    return float(np.square(values - reference).sum() / np.square(reference).sum())


def load(path: Path, monkeypatch: pytest.MonkeyPatch, isa: str, precision: Precision = "fast") -> Qwen2VL:
    monkeypatch.setenv("QWEN2VL_ISA", isa)
    m = Qwen2VL.from_gguf(path, precision=precision)
    assert m.isa == isa
    return m


# --- right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("name", SHAPES)
def test_goldens(name: str, isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goldens = np.load(GOLDENS)
    m = load(make_model(tmp_path, SHAPES[name], "f32"), monkeypatch, isa, "exact")
    c = conversation(*GOLDEN_CONVERSATION)
    for ours, golden in (
        (m.encode_image(c.images[0]), goldens[f"{name}.image"]),
        (m.logits(c.token_ids, c.images)[::8], goldens[f"{name}.logits"]),
    ):
        error = np.abs(ours - golden) / np.abs(golden).max()
        assert error.max() <= 2e-4, f"worst at {error.argmax()}, made with {goldens['made_with']}"


def test_instruction_sets_agree(wide_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the order of float sums, which now and then tips the rounding of an activation."""
    c = conversation(3, [6, (120, 90), 20])
    results = {}
    for isa in _native.supported_isas():
        m = load(wide_model, monkeypatch, isa)
        results[isa] = (m.encode_image(c.images[0]), m.logits(c.token_ids, c.images))
    image, logits = results["generic"]
    for isa, (other_image, other_logits) in results.items():
        assert nmse(other_image, image) < 1.5e-3, isa
        assert nmse(other_logits, logits) < 1.5e-3, isa


def test_fast_stays_near_exact(wide_model: Path) -> None:
    """Activations of 8 bits and a cache in f16 against float32 throughout, on the same weights.

    4-bit weights may lose a little more: they are requantized where many rows share them, which is less than
    a twentieth of what their 4 bits have lost (test_quantizing_loses_more).
    """
    c = conversation(4, [6, (120, 90), 20, (60, 200), 3])
    fast, exact = Qwen2VL.from_gguf(wide_model), Qwen2VL.from_gguf(wide_model, precision="exact")
    assert cosines(fast.encode_image(c.images[0]), exact.encode_image(c.images[0])).min() > 0.999
    bound = 2e-3 if _native.GgufFile(str(wide_model)).metadata["general.file_type"] == MOSTLY_Q4_0 else 1e-3
    assert nmse(fast.logits(c.token_ids, c.images), exact.logits(c.token_ids, c.images)) < bound


def test_quantizing_loses_more(tmp_path: Path) -> None:
    c = conversation(4, [6, (120, 90), 20, (60, 200), 3])
    q4_0, f32 = (
        Qwen2VL.from_gguf(make_model(tmp_path / type, WIDE, type), precision="exact")
        for type in ("q4_0", "f32")
    )
    assert nmse(q4_0.logits(c.token_ids, c.images), f32.logits(c.token_ids, c.images)) > 20 * 2e-3


def test_fast_stays_near_exact_with_outlier_channels(tmp_path: Path) -> None:
    path = make_model(tmp_path, replace(WIDE, outlier_channels=4), "q8_0")
    c = conversation(5, [6, (120, 90), 20])
    fast, exact = Qwen2VL.from_gguf(path), Qwen2VL.from_gguf(path, precision="exact")
    assert cosines(fast.encode_image(c.images[0]), exact.encode_image(c.images[0])).min() > 0.999
    assert nmse(fast.logits(c.token_ids, c.images), exact.logits(c.token_ids, c.images)) < 0.02


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_thread_counts_agree(threads: int, model: Qwen2VL, tmp_path: Path) -> None:
    m = Qwen2VL.from_gguf(make_model(tmp_path, WIDE, "q8_0"), n_threads=threads)
    assert m.n_threads == threads
    c = conversation(6, [200, (120, 90), 20])
    assert nmse(m.logits(c.token_ids, c.images), model.logits(c.token_ids, c.images)) < 1e-9
    model.reset()  # a last token evaluated alone has outliers of its own
    assert list(m.generate(c.token_ids, c.images, max_new_tokens=12)) == list(
        model.generate(c.token_ids, c.images, max_new_tokens=12)
    )


@pytest.mark.skipif(not INTEROP.is_dir(), reason="needs llama.cpp's files in ../shared/interop")
def test_converted_checkpoint_gives_llama_cpps_tokens(tmp_path: Path) -> None:
    """Teacher forcing: llama.cpp's tokens are fed back, and each must be our best too."""
    golden = json.loads((INTEROP / "llama_cpp_golden.json").read_text(encoding="utf-8"))
    answer = golden["models"]["interop-f16.gguf"]
    convert_checkpoint(INTEROP / "checkpoint", tmp_path / "model.gguf", Recipe("f16"))
    m = Qwen2VL.from_gguf(tmp_path / "model.gguf", precision="exact")
    assert len(answer["steps"]) == len(answer["tokens"]) - 1
    logits = m.logits(golden["prompt_tokens"] + answer["tokens"])[len(golden["prompt_tokens"]) - 1 : -1]
    log_probabilities = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    assert logits.argmax(axis=-1).tolist() == answer["tokens"]
    for row, step in zip(log_probabilities, answer["steps"], strict=False):  # it gives no step for the last
        for token, expected in step:
            assert abs(row[token] - expected) < 0.02


# --- sequences ------------------------------------------------------------------------------------


def prompt_of(m: Qwen2VL, seed: int, parts: Parts) -> tuple[_native.Prompt, list[_native.Embeddings]]:
    """A native prompt with the embeddings of its images."""
    c = conversation(seed, parts)
    images, embeddings = [], []
    for i, image in enumerate(c.images):
        pixel_values, grid = preprocess(image, 3136, 12845056)
        images.append((grid, bytes([i + 1] * 16)))
        embeddings.append(encoded_patches(m, pixel_values, grid))
    return _native.Prompt(m._native, np.array(c.token_ids, np.int32), images), embeddings


def test_prompt_in_pieces_equals_prompt_at_once(exact_model: Qwen2VL) -> None:
    model = exact_model
    parts: Parts = [70, (120, 90), 20]
    prompt, embeddings = prompt_of(model, 7, parts)
    whole = _native.SequenceState(model._native, 1024)
    whole.prefill(prompt, embeddings)
    pieces = _native.SequenceState(model._native, 1024)
    for n in (1, 64, 65, 80):  # 80 cuts the image
        head = _native.Prompt(
            model._native, np.array(conversation(7, parts).token_ids[: min(n, 70)], np.int32)
        )
        pieces.reuse(head)
        pieces.prefill(head, [])
    assert pieces.reuse(prompt) == 70
    pieces.prefill(prompt, embeddings)
    assert pieces.n_cells == whole.n_cells == len(prompt)
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-5 * np.abs(whole.logits).max())


def test_reuse_keeps_the_common_prefix_and_needs_no_image_in_it(exact_model: Qwen2VL) -> None:
    model = exact_model
    first, embeddings = prompt_of(model, 8, [9, (60, 60), 5])
    longer, _ = prompt_of(model, 8, [9, (60, 60), 5, 30])
    sequence = _native.SequenceState(model._native, 1024)
    sequence.prefill(first, embeddings)
    assert sequence.reuse(longer) == len(first)
    sequence.prefill(longer, [None])
    fresh = _native.SequenceState(model._native, 1024)
    fresh.prefill(longer, embeddings)
    np.testing.assert_allclose(sequence.logits, fresh.logits, rtol=0, atol=1e-5 * np.abs(fresh.logits).max())


def test_other_pixels_are_not_reused(model: Qwen2VL) -> None:
    c = conversation(9, [9, (60, 60), 5])
    _, grid = preprocess(c.images[0], 3136, 12845056)
    ids = np.array(c.token_ids, np.int32)
    a, b = (_native.Prompt(model._native, ids, [(grid, bytes([k] * 16))]) for k in (1, 2))
    sequence = _native.SequenceState(model._native, 64)
    sequence.prefill(a, [_native.Embeddings(model.encode_image(c.images[0]))])
    assert sequence.reuse(b) == 10  # up to the vision start token
    with pytest.raises(ValueError, match="image 0: its embeddings are needed"):
        sequence.prefill(b, [None])


def test_a_cancelled_prefill_can_go_on(model: Qwen2VL) -> None:
    prompt, embeddings = prompt_of(model, 10, [1200])
    sequence = _native.SequenceState(model._native, 2048)
    calls = []

    def cancel(done: int, total: int) -> None:
        calls.append(done)
        if done >= 1024:
            raise RuntimeError("cancelled here")

    with pytest.raises(RuntimeError, match="cancelled here"):
        while True:  # the callback is asked at most every 50 ms: a fast machine may finish first
            sequence.reuse(_native.Prompt(model._native, np.array([1], np.int32)))
            sequence.prefill(prompt, embeddings, cancel)
    assert sequence.n_cells % 512 == 0  # whole batches
    with pytest.raises(ValueError):
        _ = sequence.logits
    sequence.reuse(prompt)
    sequence.prefill(prompt, embeddings)
    fresh = _native.SequenceState(model._native, 2048)
    fresh.prefill(prompt, embeddings)
    np.testing.assert_array_equal(sequence.logits, fresh.logits)
    assert calls


def test_a_cancelled_image_leaves_the_model_usable(model: Qwen2VL) -> None:
    pixel_values, grid = preprocess(random_image(np.random.default_rng(0), 600, 800), 3136, 12845056)

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _native.VisionPass(model._native, pixel_values, grid).advance(progress=cancel)
    assert np.isfinite(encoded_patches(model, pixel_values, grid).numpy()).all()


def test_memory_grows_with_use(model: Qwen2VL) -> None:
    sequence = _native.SequenceState(model._native, 32768)
    assert sequence.kv_bytes == 0
    prompt, _ = prompt_of(model, 11, [65])
    sequence.prefill(prompt, [])
    page = 2 * 2 * 2 * 64 * 64 * 2  # layers, keys and values, heads, cells, head_dim, bytes of f16
    assert sequence.kv_bytes == 2 * page


# --- errors ---------------------------------------------------------------------------------------


def test_prompts_are_checked(model: Qwen2VL) -> None:
    def prompt(
        ids: list[int], images: list[tuple[tuple[int, int, int], bytes]] | None = None
    ) -> _native.Prompt:
        return _native.Prompt(model._native, np.array(ids, np.int32), images or [])

    key = bytes(16)
    pads = [IMAGE_PAD] * 4
    for ids, images, message in (
        ([], [], r"token_ids: expected integers \[n\], n > 0, found none"),
        ([1, 1040], [], r"token_ids\[1\]: expected 0\.\.1039, found 1040"),
        ([-1], [], r"token_ids\[0\]: expected 0\.\.1039, found -1"),
        (pads, [], r"of \[\] tokens, one an image, found \[4\]"),
        ([1, *pads], [((1, 4, 6), key)], r"\(1036\) of \[6\] tokens, one an image, found \[4\]"),
        ([*pads, 1, *pads, 2], [((1, 4, 4), key)], r"of \[4\] tokens, one an image, found \[4, 4\]"),
        ([1] + [IMAGE_PAD, 2] * 40, [], r"found \[(1, ){32}\.\.\.\]$"),
        ([1, *pads], [((1, 3, 4), key)], "multiples of 2"),
        ([1, *pads], [((1, 2**40, 2**40), key)], "grid_thw: expected 1 to 16777216, found 1099511627776"),
        ([1, *pads], [((1, 4, 4), b"short")], "16 bytes"),
        ([1, 2], [((1, 4, 4), key)], r"of \[4\] tokens, one an image, found \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            prompt(ids, images)


def test_runs_are_found_in_order(model: Qwen2VL) -> None:
    """Of pictures and videos; two kinds of pad tokens are two runs."""
    items = [((1, 4, 4), bytes(16)), ((2, 4, 6), bytes(16)), ((1, 2, 2), bytes(16))]
    ids = [5, *[IMAGE_PAD] * 4, *[VIDEO_PAD] * 12, 6, IMAGE_PAD]
    prompt = _native.Prompt(model._native, ids, items)
    assert prompt.runs == [(1, 5), (5, 17), (18, 19)]
    assert prompt.positions.shape == (3, len(ids))
    for wrong, found in ((np.zeros(3), r"float64 \[3\]"), (np.zeros((2, 2), np.int8), r"int8 \[2, 2\]")):
        with pytest.raises(ValueError, match=rf"expected integers \[n\], n > 0, found {found}"):
            _native.Prompt(model._native, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes 19 tokens, 17 of them for 3 image\(s\), but .* holds 18"):
        _native.Prompt(model._native, ids, items, n_ctx=18)


def test_context_is_a_limit(model: Qwen2VL) -> None:
    prompt, _ = prompt_of(model, 12, [8])
    sequence = _native.SequenceState(model._native, 9)
    sequence.prefill(prompt, [])
    sequence.accept(5)
    with pytest.raises(ValueError, match="context is full: it holds 9"):
        sequence.accept(5)
    with pytest.raises(ValueError, match="the context holds 4"):
        _native.SequenceState(model._native, 4).prefill(prompt, [])


def test_unknown_instruction_set_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model(tmp_path, SHAPES["grouped"], "f32")
    monkeypatch.setenv("QWEN2VL_ISA", "avx1024")
    with pytest.raises(UnsupportedError, match=r"avx1024.*generic"):
        Qwen2VL.from_gguf(path)


def test_misshapen_file_lists_every_tensor(tmp_path: Path) -> None:
    """Two tensors renamed by one letter: both are named in one error."""
    path = make_model(tmp_path, SHAPES["grouped"], "f32")
    data = path.read_bytes()
    for name in (b"blk.0.ffn_gate.weight", b"v.blk.1.ln2.bias"):
        assert data.count(name) == 1
        data = data.replace(name, name[:-1] + b"z")
    path.write_bytes(data)
    with pytest.raises(Qwen2VLError) as caught:
        Qwen2VL.from_gguf(path)
    assert "blk.0.ffn_gate.weight: missing" in str(caught.value)
    assert "v.blk.1.ln2.bias: missing" in str(caught.value)


# --- sampling -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(model: Qwen2VL) -> _native.SequenceState:
    prompt, _ = prompt_of(model, 13, [30])
    sequence = _native.SequenceState(model._native, 64)
    sequence.prefill(prompt, [])
    return sequence


def test_greedy_takes_the_best(evaluated: _native.SequenceState) -> None:
    assert evaluated.sample(_native.Sampler()) == int(evaluated.logits.argmax())
    assert evaluated.sample(_native.Sampler(temperature=2.0, top_k=1)) == int(evaluated.logits.argmax())


def test_seeds_decide(evaluated: _native.SequenceState) -> None:
    def draws(seed: int) -> list[int]:
        sampler = _native.Sampler(temperature=2.0, seed=seed)
        return [evaluated.sample(sampler) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_draws_follow_the_distribution(evaluated: _native.SequenceState) -> None:
    logits = evaluated.logits.astype(np.float64)
    top = np.argsort(-logits)[:5]
    expected = np.exp(logits[top] / 1.5)
    expected /= expected.sum()
    sampler = _native.Sampler(temperature=1.5, top_k=5, seed=3)
    draws = [evaluated.sample(sampler) for _ in range(4000)]
    frequencies = np.array([draws.count(int(token)) for token in top]) / len(draws)
    assert set(draws) <= set(top.tolist())
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(len(draws)))


@pytest.mark.parametrize("parameter", [{"top_p": 0.3}, {"min_p": 0.5}])
def test_truncation_keeps_the_likeliest(evaluated: _native.SequenceState, parameter: dict[str, Any]) -> None:
    logits = evaluated.logits.astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    if "top_p" in parameter:
        allowed = order[: int(np.searchsorted(np.cumsum(p[order]), 0.3)) + 1]
    else:
        allowed = order[p[order] >= 0.5 * p.max()]
    sampler = _native.Sampler(temperature=1.0, seed=4, **parameter)
    draws = {evaluated.sample(sampler) for _ in range(2000)}
    assert draws <= set(allowed.tolist())
    assert len(draws) > 1 or len(allowed) == 1


def test_repetition_penalty_avoids_what_was_said(model: Qwen2VL) -> None:
    ids = conversation(14, [30]).token_ids
    plain = list(model.generate(ids, max_new_tokens=30))
    punished = list(model.generate(ids, max_new_tokens=30, repetition_penalty=1e6))
    assert len(set(punished) | set(ids)) == len(punished) + len(set(ids))  # nothing twice
    assert plain != punished


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 1),
        ("repetition_penalty", 0),
    ],
)
def test_sampling_parameters_are_checked(name: str, value: float) -> None:
    parameters: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        _native.Sampler(**parameters)
