"""`exact` on float32 files agrees with transformers in float32 to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import write_checkpoint
from conversations import (
    IMAGE_PAD,
    N_TEXT_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Conversation,
    Grid,
    Parts,
    conversation,
    random_image,
)
from qwen2vl_q import Qwen2VL, VideoOptions
from qwen2vl_q.convert import Recipe, convert_checkpoint
from qwen2vl_q.vision.image_processor import ProcessedImage
from shapes import SHAPES

pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")
from reference import Reference

pytestmark = pytest.mark.parity

# Float32 rounding through a few layers; the arithmetic differs only in the order of sums.
TOLERANCE = 2e-4

CONVERSATIONS: dict[str, Parts] = {
    "text only": [23],
    "one image": [5, (90, 130), 7],
    "four images": [3, (56, 56), (140, 84), 4, (200, 61), 2, (77, 240), 9],
    "image after text": [40, (120, 120), 1],
    "image first": [(64, 180), 6],
    # 512 rows go through the model at a time: here a cut falls into the second image.
    "chunks": [100, (400, 500), 30, (500, 510), 40],
}


@dataclass(frozen=True)
class Pair:
    ours: Qwen2VL
    reference: Reference


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("parity")
    write_checkpoint(folder / "checkpoint", SHAPES[request.param], seed=1)
    convert_checkpoint(folder / "checkpoint", folder / "model.gguf", Recipe("f32"))
    return Pair(Qwen2VL.from_gguf(folder / "model.gguf", precision="exact"), Reference(folder / "checkpoint"))


def assert_close(ours: NDArray[np.float32], reference: NDArray[np.float32]) -> None:
    assert ours.shape == reference.shape
    error = np.abs(ours - reference) / np.abs(reference).max()
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= TOLERANCE, f"at {worst}: {ours[worst]} for {reference[worst]}"


@pytest.mark.parametrize("size", [(28, 28), (90, 130), (10, 300), (333, 217)])
def test_encode_image(pair: Pair, size: tuple[int, int]) -> None:
    image = random_image(np.random.default_rng(2), *size)
    assert_close(pair.ours.encode_image(image), pair.reference.encode_image(image))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits(pair: Pair, name: str) -> None:
    c = conversation(3, CONVERSATIONS[name])
    assert_close(pair.ours.logits(c.token_ids, c.images), pair.reference.logits(c.token_ids, c.images))


def assert_greedy(pair: Pair, c: Conversation, generated: list[int]) -> None:
    """Each token is the reference's best after what stands before it: so is its own greedy decoding."""
    logits = pair.reference.logits(c.token_ids + generated, c.images)
    best = logits[len(c.token_ids) - 1 : -1].argmax(axis=-1).tolist()
    assert generated == best


@pytest.mark.parametrize("name", ["text only", "one image", "four images"])
def test_greedy_tokens_over_64_steps(pair: Pair, name: str) -> None:
    for seed in range(20, 30):
        c = conversation(seed, CONVERSATIONS[name])
        generated = list(pair.ours.generate(c.token_ids, c.images, max_new_tokens=64, ignore_eos=True))
        if IMAGE_PAD not in generated:  # the reference would look for its image
            break
    assert len(generated) == 64
    assert_greedy(pair, c, generated)


def test_two_turns(pair: Pair) -> None:
    first = conversation(5, [4, (100, 150), 6])
    answer = list(pair.ours.generate(first.token_ids, first.images, max_new_tokens=8, ignore_eos=True))
    question = np.random.default_rng(6).integers(0, N_TEXT_TOKENS, 11).tolist()
    second = Conversation(first.token_ids + answer + question, first.images)
    assert_greedy(
        pair,
        second,
        list(pair.ours.generate(second.token_ids, second.images, max_new_tokens=16, ignore_eos=True)),
    )
    stats = pair.ours.last_stats
    assert stats is not None
    # Everything but the new question, and the answer's last token, which nobody had evaluated.
    assert stats.reused_tokens == len(first.token_ids) + len(answer) - 1
    assert stats.encode_seconds == 0


def random_grid_conversation(rng: np.random.Generator) -> tuple[list[int], list[tuple[str, Grid]]]:
    token_ids: list[int] = []
    grids: list[tuple[str, Grid]] = []
    for _ in range(rng.integers(1, 6)):
        token_ids += rng.integers(0, N_TEXT_TOKENS, rng.integers(0, 20)).tolist()
        h, w = (2 * rng.integers(1, 9, 2)).tolist()
        # transformers goes on after a video at max(h, w), the model's authors at max(t, h, w).
        t = int(rng.integers(1, max(h, w) // 2 + 1)) if rng.random() < 0.4 else 1
        kind, pad = ("video", VIDEO_PAD) if t > 1 else ("image", IMAGE_PAD)
        token_ids += [VISION_START, *[pad] * (t * h * w // 4), VISION_END]
        grids.append((kind, (t, h, w)))
    return [*token_ids, 7], grids


def test_position_ids_of_200_random_conversations(pair: Pair) -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        token_ids, grids = random_grid_conversation(rng)
        ours = pair.ours.position_ids(token_ids, [grid for _, grid in grids])
        np.testing.assert_array_equal(ours, pair.reference.position_ids(token_ids, grids))


# Text tokens, pictures (height, width), clips (frames, height, width).
CLIPS: dict[str, list[int | tuple[int, ...]]] = {
    "one frame": [4, (1, 56, 84), 5],
    "an odd count": [3, (5, 84, 56), 7],
    "two clips": [2, (4, 56, 56), 6, (2, 112, 56), 4],
    "clips and pictures": [3, (4, 84, 84), (90, 130), 2, (3, 56, 84), (64, 64), 5],
    "more steps than rows and columns": [3, (14, 56, 84), 8],
}


@pytest.mark.parametrize("name", CLIPS)
def test_clips(pair: Pair, name: str) -> None:
    """Pixels, logits and greedy tokens. The reference gets our positions: behind a clip of more steps than
    rows and columns its own go on elsewhere, and else `test_position_ids...` has compared them."""
    rng = np.random.default_rng(8)
    token_ids: list[int] = []
    shown: list[ProcessedImage] = []
    images: list[NDArray[np.uint8]] = []
    for part in CLIPS[name]:
        if isinstance(part, int):
            token_ids += rng.integers(0, N_TEXT_TOKENS, part).tolist()
            continue
        if len(part) == 2:
            images.append(random_image(rng, *part))
            shown.append(pair.ours.load_image(images[-1]))
        else:
            count, height, width = part
            frames = [random_image(rng, height, width) for _ in range(count)]
            shown.append(pair.ours.load_video(frames, VideoOptions(resized=(height, width))))
            assert shown[-1].pixels.shape == (count + count % 2, height, width, 3)
        pad = VIDEO_PAD if len(part) == 3 else IMAGE_PAD
        token_ids += [VISION_START, *[pad] * (int(np.prod(shown[-1].grid_thw)) // 4), VISION_END]
    clips = [item.pixels for item in shown if item.is_video]
    for item in shown:
        if item.is_video:
            expected = pair.reference.preprocess_clip(item.pixels).numpy()
            np.testing.assert_allclose(pair.ours.image_processor.patchify(item), expected, atol=1e-6)
    grids = [item.grid_thw for item in shown]
    ours = pair.ours.logits(token_ids, shown)
    positions = pair.ours.position_ids(token_ids, grids)
    assert_close(ours, pair.reference.logits(token_ids, images, clips, positions))

    generated = list(pair.ours.generate(token_ids, shown, max_new_tokens=12, ignore_eos=True))
    whole = token_ids + generated
    positions = np.concatenate(
        [positions, positions[:, -1:].max() + 1 + np.arange(len(generated))[None].repeat(3, 0)], 1
    )
    logits = pair.reference.logits(whole, images, clips, positions)
    assert generated == logits[len(token_ids) - 1 : -1].argmax(axis=-1).tolist()
