"""Sequences and vision items where rows could be mixed up: cuts, batches, videos."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from conversations import IMAGE_PAD, N_TEXT_TOKENS, VIDEO_PAD, VISION_END, VISION_START, encoded_patches
from pictures import picture
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.convert import Recipe, convert_checkpoint
from qwen2vl_q.vision.image_processor import preprocess

FloatArray = NDArray[np.float32]
GREEDY = _native.Sampler()
HIDDEN = 64  # of the model `tiny`
ROWS = 512  # that go through the model at a time


def random_ids(rng: np.random.Generator, n: int) -> list[int]:
    ids: list[int] = rng.integers(0, N_TEXT_TOKENS, n).tolist()
    return ids


def random_rows(rng: np.random.Generator, cells: int) -> _native.Embeddings:
    return _native.Embeddings(rng.standard_normal((cells, HIDDEN)).astype(np.float32))


def random_prompt(
    m: Qwen2VL, seed: int, before: int, grid: tuple[int, int, int], after: int
) -> tuple[_native.Prompt, _native.Embeddings]:
    """Text, a vision item and text, with embeddings of the item that are all different."""
    rng = np.random.default_rng(seed)
    cells = grid[0] * grid[1] * grid[2] // 4
    ids = [*random_ids(rng, before), *[IMAGE_PAD if grid[0] == 1 else VIDEO_PAD] * cells]
    prompt = _native.Prompt(m._native, np.array(ids + random_ids(rng, after), np.int32), [(grid, bytes(16))])
    return prompt, random_rows(rng, cells)


def sequence(
    m: Qwen2VL, prompt: _native.Prompt, embeddings: list[_native.Embeddings]
) -> _native.SequenceState:
    state = _native.SequenceState(m._native, 4096)
    state.prefill(prompt, embeddings)
    return state


def assert_same(values: FloatArray, expected: FloatArray) -> None:
    """Up to the order of float sums."""
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# --- cuts ---


def test_a_prefill_cancelled_inside_a_picture_goes_on_with_its_rows(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN2VL_ISA", "generic")  # slow: the callback is asked at most every 50 ms
    model = Qwen2VL.from_gguf(tiny_gguf, n_threads=1, precision="exact")
    before = 100
    prompt, embeddings = random_prompt(model, 1, before, (1, 80, 80), 20)
    fresh = sequence(model, prompt, [embeddings])
    text = _native.Prompt(model._native, np.array([1], np.int32))
    cut = _native.SequenceState(model._native, 4096)

    def cancel(done: int, total: int) -> None:
        if ROWS <= done < total:
            raise InterruptedError

    while not before < cut.n_cells < before + embeddings.shape[0]:  # a fast machine may finish first
        cut.reuse(text)
        with pytest.raises(InterruptedError):
            cut.prefill(prompt, [embeddings], cancel)
    assert cut.n_cells % ROWS == 0
    assert cut.reuse(prompt) == cut.n_cells
    cut.prefill(prompt, [embeddings])
    assert_same(cut.logits, fresh.logits)


def test_a_prompt_that_ends_in_a_picture_evaluates_its_last_row_again(tiny: Qwen2VL) -> None:
    prompt, embeddings = random_prompt(tiny, 2, 4, (1, 12, 20), 0)
    state = sequence(tiny, prompt, [embeddings])
    expected = state.logits
    assert state.reuse(prompt) == len(prompt) - 1
    state.prefill(prompt, [embeddings])
    assert_same(state.logits, expected)
    with pytest.raises(ValueError, match="image 0: its embeddings are needed"):
        state.reuse(prompt)
        state.prefill(prompt, [None])


def test_a_prefill_goes_on_from_a_prefix_alone(tiny: Qwen2VL) -> None:
    prompts = [
        _native.Prompt(tiny._native, np.array(ids, np.int32)) for ids in ([1, 2, 3], [1, 2], [1, 9, 3, 4])
    ]
    state = sequence(tiny, prompts[0], [])
    for prompt in prompts:
        with pytest.raises(ValueError, match="not a prefix of the prompt: call reuse first"):
            state.prefill(prompt, [])
        assert state.n_cells == 3


def test_logits_of_a_prompt_longer_than_one_batch(tiny: Qwen2VL) -> None:
    """Every row's stand at its place."""
    ids = np.array(random_ids(np.random.default_rng(3), 2 * ROWS + 100), np.int32)
    state = _native.SequenceState(tiny._native, 4096)
    logits = state.prefill_logits(_native.Prompt(tiny._native, ids), [])
    for n in (1, 300, ROWS, ROWS + 1, 2 * ROWS + 100):
        assert_same(logits[n - 1], sequence(tiny, _native.Prompt(tiny._native, ids[:n]), []).logits)


# --- batches ---


def accept_together(states: Sequence[_native.SequenceState], tokens: Sequence[int]) -> None:
    """Computes a token of each in one step."""
    for state, token in zip(states, tokens, strict=True):
        state.push(token)
    _native.step(states, [1] * len(states))


def test_sequences_in_a_batch_equal_each_alone(tiny: Qwen2VL) -> None:
    """At other places of the cache, at positions that a picture has moved, each with logits of its own."""
    rng = np.random.default_rng(4)
    pairs: list[tuple[_native.Prompt, list[_native.Embeddings]]] = []
    for n in (3, 90):
        pairs.append((_native.Prompt(tiny._native, np.array(random_ids(rng, n), np.int32)), []))
    prompt, embeddings = random_prompt(tiny, 5, 7, (1, 8, 12), 2)
    pairs.insert(1, (prompt, [embeddings]))
    alone, together = ([sequence(tiny, *pair) for pair in pairs] for _ in range(2))
    for _ in range(3):
        tokens = random_ids(rng, len(pairs))
        for state, token in zip(alone, tokens, strict=True):
            state.accept(token)
        accept_together(together, tokens)
        for one, other in zip(alone, together, strict=True):
            assert one.n_cells == other.n_cells
            assert_same(other.logits, one.logits)


@pytest.mark.parametrize("picture", [True, False])
def test_accepting_goes_on_where_the_prompt_would(tiny: Qwen2VL, picture: bool) -> None:
    """After a picture wider than high, and after a single token."""
    rng = np.random.default_rng(6)
    ids, images = ([7], [])
    if picture:
        ids, images = [1, 2, 3] + [IMAGE_PAD] * 12, [((1, 4, 12), bytes(16))]
    embeddings = [random_rows(rng, 12) for _ in images]
    tokens = random_ids(rng, 3)
    prompts = [_native.Prompt(tiny._native, np.array(some, np.int32), images) for some in (ids, ids + tokens)]
    state, whole = (sequence(tiny, prompt, embeddings) for prompt in prompts)
    for token in tokens:
        state.accept(token)
    assert state.n_cells == whole.n_cells
    assert_same(state.logits, whole.logits)
    assert state.reuse(prompts[1]) == len(ids) + 2  # accepted tokens are cells like a prompt's


def test_batches_are_checked(tiny: Qwen2VL, tiny_gguf: Path) -> None:
    prompt = _native.Prompt(tiny._native, np.array([1, 2], np.int32))
    a, b = (sequence(tiny, prompt, []) for _ in range(2))
    other = sequence(Qwen2VL.from_gguf(tiny_gguf, n_threads=1), prompt, [])
    empty = _native.SequenceState(tiny._native, 8)
    full = _native.SequenceState(tiny._native, 2)
    full.prefill(prompt, [])
    long = _native.SequenceState(tiny._native, 2 * ROWS)
    long.begin(_native.Prompt(tiny._native, np.ones(2 * ROWS, np.int32)), [])
    for state, token, message in (
        (empty, 1, "nothing has been evaluated yet"),
        (full, 1, "the context is full: it holds 2 tokens"),
        (a, 1040, "expected an id below 1040, found 1040"),
        (a, -1, "token: expected 0 to 2147483647, found -1"),
    ):
        for call in (state.accept, state.push):
            with pytest.raises(ValueError, match=message):
                call(token)
    _native.step([], [])
    for state in (a, b, other):
        state.push(1)
    for states, rows, message in (
        ([a, b], [1], "rows for each of 2 sequences, found 1"),
        ([a, a], [1, 1], "different sequences of one model"),
        ([b, a, b], [1, 1, 1], "different sequences of one model"),
        ([a, other], [1, 1], "different sequences of one model"),
        ([a, b], [1, 2], "expected 1 to 1 rows of a sequence, found 2"),
        ([a, long], [1, ROWS], f"expected {ROWS} rows at most, found {ROWS + 1}"),
    ):
        with pytest.raises(ValueError, match=message):
            _native.step(states, rows)
        assert [(s.n_cells, s.waiting) for s in (a, b)] == [(2, 1)] * 2


# --- videos ---


def test_a_videos_steps_do_not_see_each_other(tiny: Qwen2VL) -> None:
    stills = [preprocess(picture(140, 84, seed)) for seed in (1, 2)]
    (_, h, w) = stills[0][1]
    video = encoded_patches(tiny, np.concatenate([pixels for pixels, _ in stills]), (2, h, w)).numpy()
    apart = np.concatenate([encoded_patches(tiny, *still).numpy() for still in stills])
    assert np.abs(apart[: len(apart) // 2] - apart[len(apart) // 2 :]).max() > 0.1
    assert_same(video, apart)


def test_position_ids_of_videos(tiny: Qwen2VL) -> None:
    """By the authors' rule: time, row and column from the item's first index; text goes on at the largest
    index used plus one."""
    long = [4, VISION_START, *[VIDEO_PAD] * 6, VISION_END, 5]  # 3 steps of 1 x 2
    wide = [VISION_START, *[VIDEO_PAD] * 12, VISION_END]  # 2 steps of 2 x 3
    positions = tiny.position_ids([*long, *wide], [(3, 2, 4), (2, 4, 6)])
    expected = [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8, 9, 9, 9, 9, 9, 9, 11],
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8, 8, 8, 9, 9, 9, 8, 8, 8, 9, 9, 9, 11],
        [0, 1, 2, 3, 2, 3, 2, 3, 5, 6, 7, 8, 9, 10, 8, 9, 10, 8, 9, 10, 8, 9, 10, 11],
    ]
    np.testing.assert_array_equal(positions, expected)


def test_grids_are_checked(tiny: Qwen2VL) -> None:
    for grid in (
        *((0, 4, 4), (1, 0, 4), (1, 4, 0), (-1, 4, 4), (1, -4, 4), (1, 4, -4), (1, 3, 4), (1, 4, 3)),
        *((2, 4096, 4096), (2**25, 2, 2), (1, 2**25, 2), (1, 2, 2**25), (2**24, 2**40, 2)),
    ):
        with pytest.raises(
            ValueError,
            match=r"multiples of 2 and at most 2\^24 patches, found \(|expected (an integer of )?1 to",
        ):
            tiny.position_ids([IMAGE_PAD], [grid])
    with pytest.raises(
        ValueError, match=rf"expected runs .* of \[{2**22}\] tokens, one an image, found \[1\]"
    ):
        tiny.position_ids([IMAGE_PAD], [(1, 4096, 4096)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_section_turns_with_its_own_index(axis: int, tmp_path: Path) -> None:
    """Cells in a line along time, row or column, where the whole head turns with that, are in effect text."""
    sections = [(8, 0, 0), (0, 8, 0), (0, 0, 8)][axis]
    grid = [(5, 2, 2), (1, 10, 2), (1, 2, 10)][axis]
    write_checkpoint(tmp_path / "checkpoint", CheckpointSpec(mrope_section=sections), seed=9)
    path = tmp_path / "model.gguf"
    convert_checkpoint(tmp_path / "checkpoint", path, Recipe("f32"))
    model = Qwen2VL.from_gguf(path, n_threads=1, precision="exact")
    ids = np.array(random_ids(np.random.default_rng(9), 20), np.int32)
    cells = slice(6, 11)
    text = sequence(model, _native.Prompt(model._native, ids), [])
    embeddings = _native.Embeddings(_native.GgufFile(str(path)).read("token_embd.weight")[ids[cells]])
    ids[cells] = VIDEO_PAD
    line = sequence(model, _native.Prompt(model._native, ids, [(grid, bytes(16))]), [embeddings])
    assert_same(line.logits, text.logits)
