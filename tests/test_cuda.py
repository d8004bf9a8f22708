"""The CUDA backend: against the CPU's plain kernels, its own plain twins, and itself in other company.

Runs where a plug-in and a device are: a GPU, or the stand-in for one (CONTRIBUTING.md, "Working"), which
computes on the processor what the kernels say. There some take most of a minute: they are marked slow.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import CheckpointSpec, write_checkpoint
from children import run_script
from conversations import Parts, conversation, encoded_patches, random_image
from demo import cases
from qwen2vl_q import DEMO_MODEL, Qwen2VL, _native
from qwen2vl_q.base.errors import DeviceError
from qwen2vl_q.convert import FileType, Recipe, convert_checkpoint
from qwen2vl_q.engine.devices import cuda_plugin
from shapes import SHAPES
from test_demo_answers import FIRST_SEED, same
from test_sequences import accept_together
from weight_types import with_weights

FloatArray = NDArray[np.float32]


def missing() -> str:
    """Why these tests cannot run, or an empty string."""
    plugin = cuda_plugin()
    if plugin is None:
        return "needs the CUDA plug-in (qwen2vl-q-cuda, or QWEN2VL_CUDA_PLUGIN)"
    try:
        _native.plugin_devices(plugin)
    except DeviceError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a device")

# Widths that K-quants divide, so that the embedding of a Q4_0 file is Q6_K; the real tower's head_dim.
WIDE = CheckpointSpec(
    hidden_size=256,
    intermediate_size=512,
    mrope_section=(8, 12, 12),
    embed_dim=160,
    num_heads=2,
)
MORE: dict[str, CheckpointSpec] = {
    **SHAPES,
    # 6 query heads a key-value head, head_dim 128, as the 2B model has.
    "like_2b": CheckpointSpec(
        hidden_size=768,
        intermediate_size=1280,
        num_attention_heads=6,
        num_key_value_heads=1,
        mrope_section=(16, 24, 24),
        embed_dim=320,
        num_heads=4,
    ),
    # A head_dim that is filled up, more query heads than a launch takes.
    "head_dim_48": CheckpointSpec(
        hidden_size=48 * 10,
        num_attention_heads=10,
        num_key_value_heads=1,
        mrope_section=(8, 8, 8),
        embed_dim=96,
        num_heads=1,
    ),
}
# Activations as bf16 lose 2^-9 of each value, in every layer; the plain twins lose rounding alone.
FAST, EXACT = 4e-4, 1e-9


def make(folder: Path, spec: CheckpointSpec, type: FileType = "q8_0") -> Path:
    convert_checkpoint(write_checkpoint(folder / "checkpoint", spec, 7), folder / "model.gguf", Recipe(type))
    return folder / "model.gguf"


def nmse(values: FloatArray, reference: FloatArray) -> float:
    return float(((values - reference) ** 2).sum() / (reference**2).sum())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module")
def model(wide: Path) -> Qwen2VL:
    return Qwen2VL.from_gguf(wide, device="cuda")


@pytest.fixture(scope="module")
def reference(wide: Path) -> Qwen2VL:
    return Qwen2VL.from_gguf(wide, precision="exact")


CONVERSATION: Parts = [5, (90, 130), 7, (56, 84), 3]


SLOW = {("like_2b", "exact"), ("head_dim_80", "exact"), ("head_dim_48", "exact")}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=pytest.mark.slow if (name, precision) in SLOW else ())
        for name in MORE
        for precision in ("exact", "fast")
    ],
)
def test_shapes(name: str, precision: str, tmp_path: Path) -> None:
    path = make(tmp_path, MORE[name], "f32")
    cpu = Qwen2VL.from_gguf(path, precision="exact")
    gpu = Qwen2VL.from_gguf(path, precision=precision, device="cuda")  # type: ignore[arg-type]
    bound = EXACT if precision == "exact" else FAST
    c = conversation(1, CONVERSATION)
    assert nmse(gpu.encode_image(c.images[0]), cpu.encode_image(c.images[0])) < bound
    assert nmse(gpu.logits(c.token_ids, c.images), cpu.logits(c.token_ids, c.images)) < bound
    few = conversation(2, [20]).token_ids
    assert nmse(gpu.logits(few), cpu.logits(few)) < bound


@pytest.mark.parametrize(
    "type",
    [*(pytest.param(type, marks=pytest.mark.slow) for type in ("f32", "f16", "bf16", "q8_0")), "q4_k_m"],
)
def test_file_types(type: FileType, tmp_path: Path) -> None:
    path = make(tmp_path, WIDE, type)
    cpu = Qwen2VL.from_gguf(path, precision="exact")
    c, few = conversation(3, [70, (60, 200), 3]), conversation(4, [9]).token_ids
    for precision, bound in (("exact", EXACT), ("fast", FAST)):
        gpu = Qwen2VL.from_gguf(path, precision=precision, device="cuda")  # type: ignore[arg-type]
        assert nmse(gpu.logits(c.token_ids, c.images), cpu.logits(c.token_ids, c.images)) < bound
        assert nmse(gpu.logits(few), cpu.logits(few)) < bound
        assert gpu.precision == precision


@pytest.mark.parametrize(
    "name",
    ["Q2_K", "Q3_K", "Q5_1", "IQ4_XS"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "IQ4_NL")
    ],
)
def test_weight_types(name: str, tmp_path: Path) -> None:
    """Blocks with integers and scales of any kind, against the numbers that they stand for."""
    source = make(tmp_path, WIDE, "f32")
    packed = with_weights(source, tmp_path / "packed.gguf", name, as_f32=False)
    reference = with_weights(source, tmp_path / "reference.gguf", name, as_f32=True)
    cpu = Qwen2VL.from_gguf(reference, precision="exact")
    ids, few = (conversation(3, [n]).token_ids for n in (70, 9))
    gpu = Qwen2VL.from_gguf(packed, device="cuda")
    assert nmse(gpu.logits(ids), cpu.logits(ids)) < FAST
    assert nmse(gpu.logits(few), cpu.logits(few)) < FAST
    gpu = Qwen2VL.from_gguf(packed, precision="exact", device="cuda")
    assert nmse(gpu.logits(few), cpu.logits(few)) < EXACT


def test_outlier_channels(tmp_path: Path) -> None:
    path = make(tmp_path, replace(WIDE, outlier_channels=4), "q8_0")
    cpu = Qwen2VL.from_gguf(path, precision="exact")
    gpu = Qwen2VL.from_gguf(path, device="cuda")
    c = conversation(5, [6, (120, 90), 70])
    assert nmse(gpu.encode_image(c.images[0]), cpu.encode_image(c.images[0])) < FAST
    assert nmse(gpu.logits(c.token_ids, c.images), cpu.logits(c.token_ids, c.images)) < FAST


def test_a_large_picture(model: Qwen2VL, reference: Qwen2VL) -> None:
    """Several tiles of queries and of keys, the last ones cut."""
    image = random_image(np.random.default_rng(6), 300, 430)
    assert nmse(model.encode_image(image), reference.encode_image(image)) < FAST


def test_temporal_steps_do_not_see_each_other(model: Qwen2VL, reference: Qwen2VL) -> None:
    rng = np.random.default_rng(7)
    pixels = rng.standard_normal((3 * 8 * 6, 1176)).astype(np.float32)
    together = encoded_patches(model, pixels, (3, 8, 6)).numpy()
    assert nmse(together, encoded_patches(reference, pixels, (3, 8, 6)).numpy()) < FAST
    for t in range(3):
        alone = encoded_patches(model, pixels[t * 48 : (t + 1) * 48], (1, 8, 6)).numpy()
        np.testing.assert_array_equal(together[t * 12 : (t + 1) * 12], alone)


def test_a_long_prompt_and_decoding_at_depth(model: Qwen2VL, reference: Qwen2VL) -> None:
    """More rows than a batch takes; then decoding over many chunks of pages."""
    ids = conversation(8, [2300]).token_ids
    prompt = np.array(ids, np.int32)
    states = []
    for m in (model, reference):
        state = _native.SequenceState(m._native, 4096)
        state.prefill(_native.Prompt(m._native, prompt), [])
        states.append(state)
    assert nmse(states[0].logits, states[1].logits) < FAST
    for token in (3, 1000, 17):
        for state in states:
            state.accept(token)
        assert nmse(states[0].logits, states[1].logits) < FAST


def test_prompts_in_pieces(model: Qwen2VL) -> None:
    """Rows of more than a few go the same way, however a prompt is cut."""
    ids = np.array(conversation(9, [330]).token_ids, np.int32)
    whole = _native.SequenceState(model._native, 1024)
    whole.prefill(_native.Prompt(model._native, ids), [])
    pieces = _native.SequenceState(model._native, 1024)
    for n in (100, 257, 330):
        prompt = _native.Prompt(model._native, ids[:n])
        pieces.reuse(prompt)
        pieces.prefill(prompt, [])
    np.testing.assert_array_equal(pieces.logits, whole.logits)


def alone(model: Qwen2VL, ids: NDArray[np.int32], n: int) -> tuple[list[int], list[FloatArray]]:
    """Greedy tokens, and the logits after each."""
    state = _native.SequenceState(model._native, 512)
    state.prefill(_native.Prompt(model._native, ids), [])
    greedy, tokens, logits = _native.Sampler(), [], []
    for _ in range(n):
        tokens.append(state.sample(greedy))
        state.accept(tokens[-1])
        logits.append(state.logits.copy())
    return tokens, logits


@pytest.mark.parametrize("streams", [2, 7, pytest.param(40, marks=pytest.mark.slow)])
def test_streams_together_equal_each_alone(model: Qwen2VL, streams: int) -> None:
    rng = np.random.default_rng(streams)
    prompts = [rng.integers(0, 1024, int(n)).astype(np.int32) for n in rng.integers(1, 90, streams)]
    expected = [alone(model, ids, 4) for ids in prompts]
    greedy, states = _native.Sampler(), []
    for ids in prompts:
        states.append(_native.SequenceState(model._native, 512))
        states[-1].prefill(_native.Prompt(model._native, ids), [])
    for step in range(4):
        tokens = [state.sample(greedy) for state in states]
        assert tokens == [found[0][step] for found in expected]
        accept_together(states, tokens)
        for state, found in zip(states, expected, strict=True):
            np.testing.assert_array_equal(state.logits, found[1][step])


def test_sequences_share_the_pages_of_what_they_have_in_common(model: Qwen2VL) -> None:
    """Full pages are anyone's; of a part-filled one that another writes to, a copy is made."""
    rng = np.random.default_rng(14)
    common = rng.integers(0, 1024, 150).astype(np.int32)
    endings = [rng.integers(0, 1024, n).astype(np.int32) for n in (3, 5, 70)]
    prompts = [np.append(common, ending).astype(np.int32) for ending in endings]
    model._native.forget()
    expected = [alone(model, ids, 4) for ids in prompts]
    model._native.forget()
    greedy, states = _native.Sampler(), []
    for ids in prompts:
        states.append(_native.SequenceState(model._native, 512))
        prompt = _native.Prompt(model._native, ids)
        assert states[-1].adopt(prompt) == (150 if len(states) > 1 else 0)
        states[-1].prefill(prompt, [])
    pages = model._native.cache_bytes // (64 * model._native.cell_bytes)
    assert pages == 2 + 1 + 1 + 2  # two full ones; what each has of the third, and more
    for step in range(4):
        tokens = [state.sample(greedy) for state in states]
        assert tokens == [found[0][step] for found in expected]
        accept_together(states, tokens)
        for state, found in zip(states, expected, strict=True):
            assert nmse(state.logits, found[1][step]) < 1e-4


def test_a_step_ahead_is_forgotten_when_another_token_comes(model: Qwen2VL) -> None:
    ids = np.array(conversation(10, [30]).token_ids, np.int32)
    greedy = _native.Sampler()
    ahead, plain = (_native.SequenceState(model._native, 512) for _ in range(2))
    for state in (ahead, plain):
        state.prefill(_native.Prompt(model._native, ids), [])
    for _ in range(3):
        token = ahead.sample(greedy)  # from here on a step is under way
        assert token == int(plain.logits.argmax())
        ahead.accept(token)
        plain.accept(token)
    other = (ahead.sample(greedy) + 1) % 1024
    ahead.accept(other)
    plain.accept(other)
    np.testing.assert_array_equal(ahead.logits, plain.logits)
    # A prompt that shares a prefix cuts the cache back under a step that is under way.
    prompt = _native.Prompt(model._native, np.append(ids[:20], [5, 6]).astype(np.int32))
    ahead.sample(greedy)
    for state in (ahead, plain):
        assert state.reuse(prompt) == 20
        state.prefill(prompt, [])
    np.testing.assert_array_equal(ahead.logits, plain.logits)


def test_a_step_ahead_is_of_one_sequence_alone(model: Qwen2VL) -> None:
    """Another one of the same length, which goes on with the very same token, gets a result of its own."""
    first, second = (
        np.array(conversation(seed, [n]).token_ids, np.int32) for seed, n in ((15, 30), (16, 33))
    )
    greedy = _native.Sampler()
    ahead, other, plain = (_native.SequenceState(model._native, 512) for _ in range(3))
    for state, ids in ((other, second), (ahead, first)):
        state.prefill(_native.Prompt(model._native, ids), [])
    for _ in range(3):
        ahead.accept(ahead.sample(greedy))
    token = ahead.sample(greedy)  # its step is under way
    assert ahead.n_cells == other.n_cells
    other.accept(token)
    plain.prefill(_native.Prompt(model._native, np.append(second, token).astype(np.int32)), [])
    assert nmse(other.logits, plain.logits) < FAST
    ahead.accept(token)
    assert nmse(ahead.logits, plain.logits) > 1e-2


def test_sequences_keep_their_logits_while_others_go_on(model: Qwen2VL) -> None:
    greedy, states, best = _native.Sampler(), [], []
    for seed in range(5):
        ids = np.array(conversation(20 + seed, [12]).token_ids, np.int32)
        states.append(_native.SequenceState(model._native, 64))
        states[-1].prefill(_native.Prompt(model._native, ids), [])
        best.append(alone(model, ids, 1)[0][0])
    assert [state.sample(greedy) for state in states] == best
    assert [int(state.logits.argmax()) for state in states] == best


def test_a_cancelled_call_leaves_the_cache_as_it_was(model: Qwen2VL) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    ids = np.array(conversation(11, [200]).token_ids, np.int32)
    state = _native.SequenceState(model._native, 512)
    prompt = _native.Prompt(model._native, ids)
    with pytest.raises(Stop):
        state.prefill(prompt, [], stop)
    assert state.n_cells == 0
    state.prefill(prompt, [])
    fresh = _native.SequenceState(model._native, 512)
    fresh.prefill(prompt, [])
    np.testing.assert_array_equal(state.logits, fresh.logits)


def test_memory_grows_with_use(model: Qwen2VL) -> None:
    state = _native.SequenceState(model._native, 32768)
    assert state.kv_bytes == 0
    state.prefill(_native.Prompt(model._native, np.arange(64, dtype=np.int32)), [])
    page = 2 * 2 * 2 * 64 * 64 * 2  # layers, keys and values, heads, cells, head_dim, bytes of f16
    assert state.kv_bytes == page


def test_weights_without_room_stay_in_the_hosts_memory(wide: Path, model: Qwen2VL) -> None:
    native = _native.Model(str(wide), device="cuda", plugin=cuda_plugin(), device_memory=500_000)
    assert "stay in the host's memory" in native.note
    assert model.note == ""
    prompt = np.array(conversation(12, [100]).token_ids, np.int32)
    logits = []
    for m in (native, model._native):
        state = _native.SequenceState(m, 256)
        state.prefill(_native.Prompt(m, prompt), [])
        state.accept(3)
        logits.append(state.logits)
    np.testing.assert_array_equal(logits[0], logits[1])


SEVERAL_DEVICES = """
import sys
import numpy as np
from qwen2vl_q import _native
path, plugin, layer_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids = np.random.default_rng(0).integers(0, 1024, 80).astype(np.int32)
patches = np.random.default_rng(1).standard_normal((8 * 6, 1176)).astype(np.float32)
greedy = _native.Sampler()

def results(model, common):  # of two sequences that have so many tokens in common
    image = _native.VisionPass(model, patches, (1, 8, 6)).advance()
    seen = _native.SequenceState(model, 64)
    prompt = _native.Prompt(model, np.array([7, *[1036] * 12, 9], np.int32), [((1, 8, 6), bytes(16))])
    reports = []

    def stop(done, total):  # on the way through the layers
        reports.append(done)
        if 2 * done > total:
            raise InterruptedError

    try:
        seen.prefill(prompt, [image], stop)
    except InterruptedError:
        seen.prefill(prompt, [image])
    assert reports
    found = [image.numpy(), seen.logits.copy()]
    states = [_native.SequenceState(model, 512) for _ in range(2)]
    for state, prompt in zip(states, (ids[: common + 5], np.append(ids[:common], [3, 5]).astype(np.int32))):
        prompt = _native.Prompt(model, prompt)
        found.append(np.array([state.adopt(prompt)]))
        state.prefill(prompt, [])
        found.append(state.logits.copy())
    for _ in range(4 if precision == "fast" else 1):
        for state in states:
            token = state.sample(greedy)
            found.append(np.array([token]))
            state.accept(token)
    found += [state.logits.copy() for state in states]
    return found

precision = sys.argv[4]
for common, layers, stay in ((70, 2.4, False), (3, 1.2, True)) if precision == "fast" else ((3, 2.4, False),):
    load = lambda device, memory: _native.Model(
        path, device=device, plugin=plugin, device_memory=memory, precision=precision
    )
    alone, model = load("cuda:0", 0), load("cuda", int(layers * layer_bytes))
    expected, found = results(alone, common), results(model, common)
    assert (alone.device, model.device) == ("stand-in, sm_80", "3 x stand-in, sm_80")
    assert alone.note == "" and ("stay in the host's memory" in model.note) == stay, model.note
    assert model.cell_bytes == alone.cell_bytes and model.weight_bytes >= alone.weight_bytes
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
model.start_profile()
results(model, 3)
assert {stage["name"] for stage in model.stop_profile()} >= {"text qkv_proj", "text lm_head"}
assert model.read_weights() > 0
one = load("cuda:1", int(2.4 * layer_bytes))
assert one.device == "stand-in, sm_80" and "the device's memory" in one.note
print("equal")
"""


@pytest.mark.parametrize(
    ("precision", "tied"),
    [
        ("fast", False),
        pytest.param("fast", True, marks=pytest.mark.slow),
        pytest.param("exact", False, marks=pytest.mark.slow),
    ],
)
def test_layers_in_sequence_on_several_devices(precision: str, tied: bool, tmp_path: Path) -> None:
    """The same bits; a kernel that touched another device's memory would end the process."""
    if "stand-in" not in _native.plugin_devices(str(cuda_plugin()))[0]["name"]:
        pytest.skip("needs the stand-in: of it there are as many as one asks for")
    spec = replace(WIDE, num_hidden_layers=4, tie_word_embeddings=tied, embed_dim=64, depth=1)
    path = make(tmp_path, spec, "q8_0" if precision == "fast" else "f32")  # there as the file has them
    layer = sum(t.n_bytes for t in _native.GgufFile(str(path)).tensors if t.name.startswith("blk.0."))
    environment = {**os.environ, "QWEN2VL_STAND_IN_DEVICES": "3"}
    arguments = (path, cuda_plugin(), layer, precision)
    assert run_script(SEVERAL_DEVICES, *arguments, env=environment) == "equal\n"


def test_profile_times_every_stage(model: Qwen2VL) -> None:
    c = conversation(13, [70, (60, 60), 3])
    with model.profile() as stages:
        model.reset()
        list(model.generate(c.token_ids, c.images, max_new_tokens=3, ignore_eos=True))
    names = {stage.name for stage in stages}
    assert {"image attention", "image fc1", "text qkv_proj", "text attention", "text lm_head"} <= names
    assert all(stage.seconds >= 0 and stage.calls > 0 for stage in stages)
    assert model.read_weights() > 0


@pytest.mark.slow
def test_answers_about_cards() -> None:
    """The demo model says on the device what it says on the CPU; boxes may differ in their last digits."""
    gpu, cpu = (Qwen2VL.from_gguf(DEMO_MODEL, device=device) for device in ("cuda", "cpu"))
    assert gpu.device != "cpu"
    differing = []
    for task in ("what", "read", "count", "box"):
        for k in range(3):
            case = cases.case(task, FIRST_SEED + k)
            question = case.turns[-1].question
            content = [
                *({"type": "image", "image": image} for image in case.images),
                {"type": "text", "text": question},
            ]
            found = [
                m.chat([{"role": "user", "content": content}], False, temperature=0, max_new_tokens=32)
                for m in (gpu, cpu)
            ]
            if not same(*found):
                differing.append((question, *found))
    assert len(differing) <= 1, differing


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="99"):
        Qwen2VL.from_gguf(DEMO_MODEL, device="cuda:99")
