"""Whether a model's file says what another one does: weights, the vision tower's output, next tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.printable import printable
from qwen2vl_q.measure.comparable import require_comparable
from qwen2vl_q.measure.conversations import Conversation, Prompt, built_in, prompt_of
from qwen2vl_q.measure.divergence import Divergence, compare
from qwen2vl_q.measure.model_source import ModelFile, opened, source_of
from qwen2vl_q.measure.tensor_errors import TensorError, paired, stored_tensors, tensor_errors
from qwen2vl_q.model import Qwen2VL

MAX_NEW_TOKENS = 32  # of the reference's own answers

Progress = Callable[[str, int, int], None]
Precision = Literal["fast", "exact"]


@dataclass(frozen=True)
class Thresholds:
    """What a file must keep to. The defaults are chosen, not calibrated: no released model was measured."""

    tensor_error: float = 0.1  # of the worst tensor, `TensorError.relative`, at most
    cosine: float = 0.99  # of the worst picture, at least
    kl: float = 0.1  # mean, nats a token, at most
    agreement: float = 0.9  # share of the same likeliest token, at least


@dataclass(frozen=True)
class PictureError:
    name: str
    tokens: int
    cosine: float  # of the whole picture's embeddings; 0 where one is not finite


@dataclass(frozen=True)
class Verification:
    model: ModelFile
    reference: str
    precision: Precision
    isa: str
    tensors: Sequence[TensorError]
    pictures: Sequence[PictureError]
    divergence: Divergence
    notes: Sequence[str] = field(default=())

    @property
    def worst(self) -> list[TensorError]:
        return sorted(self.tensors, key=lambda tensor: -tensor.relative)

    def failures(self, allowed: Thresholds) -> list[str]:
        """What does not keep to the thresholds, a line each; none where the file is as good as asked for."""
        found = [
            f"tensor {tensor.name}: relative squared error {tensor.relative:.2g}, "
            f"allowed {allowed.tensor_error:g}"
            for tensor in self.worst
            if tensor.relative > allowed.tensor_error
        ]
        found += [
            f"picture {printable(picture.name)}: cosine {picture.cosine:.6f}, asked for {allowed.cosine:g}"
            for picture in self.pictures
            if picture.cosine < allowed.cosine
        ]
        if self.divergence.mean > allowed.kl:
            found.append(f"KL divergence {self.divergence.mean:.2g} nats a token, allowed {allowed.kl:g}")
        if self.divergence.agreement < allowed.agreement:
            found.append(
                f"same likeliest token {self.divergence.agreement:.4f}, asked for {allowed.agreement:g}"
            )
        return found


def verify(
    model: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    mmproj: str | os.PathLike[str] | None = None,
    reference_mmproj: str | os.PathLike[str] | None = None,
    conversations: Iterable[Conversation] | None = None,
    precision: Precision = "fast",
    n_threads: int | None = None,
    device: str = "cpu",
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress | None = None,
) -> Verification:
    """Compares a file with a reference: GGUF files, with their vision towers inside, given or beside them, or
    checkpoints' folders, which become temporary files (of TMPDIR's disk) that lose nothing.

    The reference computes on the CPU in exact precision, the file on `device` in `precision`: with "exact"
    the figures are of its weights alone. Conversations: `built_in` where None. Raises ValueError, before
    anything is computed, where the two are not the same model but for the types of their weights; else as
    `Qwen2VL.from_gguf` and `convert_checkpoint`.
    """

    def staged(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    sources = source_of(model, mmproj), source_of(reference, reference_mmproj)
    notes = require_comparable(*sources)
    with opened(sources[1], staged("convert")) as expected, opened(sources[0], staged("convert")) as found:
        errors = compare_weights(found, expected, staged("weights"))
        with loaded(expected, "exact", n_threads, progress) as exact:
            if conversations is None:
                conversations = built_in(exact.config.vision_config is not None)
            prompts = [prompt_of(exact, each, max_new_tokens) for each in conversations]
            with loaded(found, precision, n_threads, progress, device) as other:
                outputs = ((prompt, Output.of(exact, prompt)) for prompt in prompts)
                pictures, divergence = compare_outputs(outputs, other, staged("answers"), len(prompts))
                return Verification(
                    found, os.fspath(reference), precision, other.isa, errors, pictures, divergence, notes
                )


def compare_weights(
    file: ModelFile, reference: ModelFile, progress: Callable[[int, int], None] | None = None
) -> list[TensorError]:
    """Errors as of `stored_tensors` and `paired`."""
    return tensor_errors(paired(stored_tensors(file), stored_tensors(reference)), progress)


def loaded(
    file: ModelFile,
    precision: Precision,
    n_threads: int | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
) -> Qwen2VL:
    return Qwen2VL.from_gguf(
        file.path,
        n_threads,
        precision=precision,
        mmproj=False if file.mmproj is None else file.mmproj,
        device=device,
        progress=progress,
    )


@dataclass(frozen=True)
class Output:
    """What a model makes of a prompt: each picture's embeddings [n_tokens, hidden_size], and the logits
    [answer, vocab_size] that predict the answer's tokens."""

    embeddings: Sequence[NDArray[np.float32]]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, model: Qwen2VL, prompt: Prompt) -> Output:
        logits = model.logits(prompt.token_ids, prompt.images)
        return cls(
            [model.encode_image(image) for image in prompt.images], logits[-prompt.answer - 1 : -1].copy()
        )


def compare_outputs(
    expected: Iterable[tuple[Prompt, Output]],
    model: Qwen2VL,
    progress: Callable[[int, int], None] | None = None,
    total: int = 0,
) -> tuple[list[PictureError], Divergence]:
    """A model beside what the reference made of the same prompts, `total` of them for `progress`."""
    pictures: dict[bytes, PictureError] = {}
    compared = []
    for done, (prompt, reference) in enumerate(expected, 1):
        own = Output.of(model, prompt)
        for image, a, b in zip(prompt.images, own.embeddings, reference.embeddings, strict=True):
            pictures[image.key] = PictureError(prompt.name, len(a), _cosine(a, b))
        compared.append(compare(reference.logits, own.logits))
        if progress is not None:
            progress(done, total)
    return list(pictures.values()), Divergence.of(compared)


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = float(x @ y / np.sqrt((x @ x) * (y @ y)))
    return min(cosine, 1.0) if math.isfinite(cosine) else 0.0
