"""What becomes of a row depends on its own kind (prompt or decoded) and content: the same bits however a
prompt is cut, whatever was in the cache, and whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters import factors, write_adapter
from checkpoints import CheckpointSpec, random_tensors, write_checkpoint
from conversations import IMAGE_PAD, N_TEXT_TOKENS
from qwen2vl_q import Qwen2VL, _native
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint
from test_sequences import accept_together

SPEC = CheckpointSpec(
    hidden_size=256,
    intermediate_size=320,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(8, 12, 12),
    rope_theta=1e6,
    outlier_channels=2,
    outlier_scale=10.0,
    key_bias=900.0,
    dtype="BF16",
)
N_CTX = 2048
CASES = [
    pytest.param(file_type, isa, threads, adapted, id=f"{file_type}-{isa}-{threads}{'-lora' * adapted}")
    for file_type in ("q8_0", "q4_0", "f16")
    for isa in _native.supported_isas()
    for threads in ((1, 3) if isa == _native.supported_isas()[0] else (2,))
    for adapted in ((False, True) if file_type == "q8_0" and threads > 1 else (False,))
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("rows"), SPEC, seed=4)
    for file_type in ("q8_0", "q4_0", "f16"):
        convert_checkpoint(folder, folder / f"{file_type}.gguf", Recipe(file_type))
    rng = np.random.default_rng(5)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, values in random_tensors(SPEC, 4).items():
        if name.startswith("model.layers.") and name.endswith("_proj.weight"):
            tensors |= factors(rng, name.removesuffix(".weight"), values.shape, 4)
    write_adapter(folder / "lora", tensors)
    return folder


@pytest.fixture
def model(
    files: Path, file_type: FileType, isa: str, threads: int, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> Qwen2VL:
    monkeypatch.setenv("QWEN2VL_ISA", isa)
    lora = [files / "lora"] if adapted else []
    return Qwen2VL.from_gguf(files / f"{file_type}.gguf", n_threads=threads, lora=lora)


def text(m: Qwen2VL, ids: NDArray[np.int32]) -> _native.Prompt:
    return _native.Prompt(m._native, ids)


@pytest.mark.parametrize(("file_type", "isa", "threads", "adapted"), CASES)
def test_a_prompt_may_be_cut_anywhere(model: Qwen2VL) -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, N_TEXT_TOKENS, 640).astype(np.int32)
    ids[90:102] = IMAGE_PAD
    picture = _native.Embeddings(rng.standard_normal((12, SPEC.hidden_size)).astype(np.float32))
    prompt = _native.Prompt(model._native, ids, [((1, 6, 8), bytes(16))])
    whole = _native.SequenceState(model._native, N_CTX).prefill_logits(prompt, [picture])
    cut = _native.SequenceState(model._native, N_CTX)
    rows = []
    for end in (1, 3, 20, 84, 85, 120, 200, 263, 264, 500, 639):
        head = ids[:end]
        items = [((1, 6, 8), bytes(16))] if end > 90 else []
        cut.reuse(head_prompt := _native.Prompt(model._native, head, items))
        rows.append(cut.prefill_logits(head_prompt, [picture] * len(items)))
    cut.reuse(prompt)
    rows.append(cut.prefill_logits(prompt, [None]))
    np.testing.assert_array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize(("file_type", "isa", "threads", "adapted"), CASES)
def test_a_decoded_token_may_stand_among_others(model: Qwen2VL) -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, N_TEXT_TOKENS, (48, 2)).tolist()

    def states(n: int) -> list[_native.SequenceState]:
        made = []
        for i in range(n):
            # The second is long enough that its attention is split.
            prompt = np.random.default_rng(i).integers(0, N_TEXT_TOKENS, 1100 if i == 1 else 5 + 3 * i)
            made.append(_native.SequenceState(model._native, N_CTX))
            made[-1].prefill(text(model, prompt.astype(np.int32)), [])
        return made

    alone = states(48)
    for state, drawn in zip(alone, tokens, strict=True):
        for token in drawn:
            state.accept(token)
    for n in (2, 16, 48):
        together = states(n)
        for step in range(2):
            accept_together(together, [tokens[i][step] for i in range(n)])
        for one, other in zip(alone, together, strict=False):
            np.testing.assert_array_equal(other.logits, one.logits)


@pytest.mark.parametrize(("file_type", "isa", "threads", "adapted"), CASES)
def test_a_token_may_be_computed_before_it_is_drawn(model: Qwen2VL) -> None:
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, N_TEXT_TOKENS, 9).tolist()
    for length in (5, 1100):
        prompt = text(model, rng.integers(0, N_TEXT_TOKENS, length).astype(np.int32))
        alone, guessing = (_native.SequenceState(model._native, N_CTX) for _ in range(2))
        for state in (alone, guessing):
            state.prefill(prompt, [])
        expected = []
        for token in tokens:
            alone.accept(token)
            expected.append(alone.logits)
        guessing.push(tokens[0])
        assert guessing.guess(tokens[1:8]) == 7
        beside = _native.SequenceState(model._native, N_CTX)
        beside.begin(prompt, [])
        _native.step([beside, guessing], [3, 1])
        for token, logits in zip(tokens, expected, strict=True):
            if token != tokens[0]:
                guessing.accept(token)
            np.testing.assert_array_equal(guessing.logits, logits)


@pytest.mark.parametrize(("file_type", "isa", "threads", "adapted"), CASES)
def test_tokens_and_prompts_may_share_a_step(model: Qwen2VL) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, N_TEXT_TOKENS, n).astype(np.int32) for n in (30, 75, 200, 90)]

    def begun(n: int) -> list[_native.SequenceState]:
        made = [_native.SequenceState(model._native, N_CTX) for _ in range(n)]
        for state, prompt in zip(made, prompts, strict=False):
            state.begin(text(model, prompt), [])
        return made

    alone = begun(4)
    for state, prompt in zip(alone, prompts, strict=True):
        _native.step([state], [len(prompt)])
    for state in alone[:2]:
        state.push(7)
        _native.step([state], [1])
    together = begun(4)
    _native.step(together[1:2], [75])
    together[1].push(7)
    _native.step(together, [30, 1, 60, 89])  # the order of a batch is anyone's
    together[0].push(7)
    _native.step([together[2], together[0], together[3]], [140, 1, 1])
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(other.logits, one.logits)
