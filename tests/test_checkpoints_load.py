"""The checkpoints that the tests write are ones that transformers loads, and whose outputs say something."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import CheckpointSpec, write_checkpoint
from shapes import SHAPES

pytestmark = pytest.mark.parity

SPECS = SHAPES | {
    "flat": CheckpointSpec(),
    "f16": CheckpointSpec(dtype="F16", n_shards=2),
    "bf16": CheckpointSpec(dtype="BF16", layout="nested"),
    "outliers": CheckpointSpec(outlier_channels=2),
}


@pytest.mark.parametrize("name", SPECS)
def test_checkpoint_loads_in_transformers(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = SPECS[name]
    folder = write_checkpoint(tmp_path, spec)
    model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert {key: value for key, value in info.items() if value} == {}
    text, vision = model.config.text_config, model.config.vision_config
    assert text.rope_parameters["rope_theta"] == spec.rope_theta
    assert list(text.rope_parameters["mrope_section"]) == list(spec.mrope_section)
    assert (text.rms_norm_eps, vision.embed_dim, vision.depth) == (1e-6, spec.embed_dim, spec.depth)
    assert model.config.tie_word_embeddings is spec.tie_word_embeddings

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == model.config.image_token_id
    ids = torch.tensor([tokenizer.encode("<|im_start|>user\nHello, world!<|im_end|>\n")])
    patches = torch.tensor(np.random.default_rng(1).standard_normal((16, 1176)), dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        image = model.model.visual(patches, grid_thw=torch.tensor([[1, 4, 4]])).pooler_output
        answer = model.generate(input_ids=ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    # Logits as those of a model that prefers some tokens, outputs that depend on token and place.
    assert 0.5 < logits.std() < 5
    assert 0.1 < image.std() < 5
    assert (logits[1:] - logits[:-1]).abs().mean() > 0.1
    assert (image[1:] - image[:-1]).abs().mean() > 0.1
    assert len(set(answer.tolist())) >= 8


def test_storage_does_not_change_the_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    one = CheckpointSpec()
    other = replace(one, layout="nested", naming="nested", n_shards=3, tokenizer="vocab")
    states = [
        transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            write_checkpoint(tmp_path / n, spec)
        ).state_dict()
        for n, spec in (("a", one), ("b", other))
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
