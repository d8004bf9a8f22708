"""Qwen2VL: a loaded model, its tokenizer, its template and one conversation's cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.chat_template import DEFAULT_TEMPLATE, TEMPLATE, ChatTemplate
from qwen2vl_q.config import Qwen2VLConfig
from qwen2vl_q.devices import plugin_for, require_name
from qwen2vl_q.errors import FormatError, UnsupportedError
from qwen2vl_q.generation import Generation, Progress, TokenIds, stage
from qwen2vl_q.image_processor import ImageInput, ImageProcessor, ProcessedImage
from qwen2vl_q.limits import Stage
from qwen2vl_q.messages import normalize, read_source
from qwen2vl_q.sampling import Sampling
from qwen2vl_q.stats import GenerationStats
from qwen2vl_q.text_stream import TextStream
from qwen2vl_q.tokenizer import GROUNDING_TOKENS, Tokenizer

TRAINED_CONTEXT = 32768


class Qwen2VL:
    """A Qwen2-VL model on this machine's CPU or a GPU.

    One conversation's KV cache lives in it: a call of `generate` or `chat` evaluates only what its prompt
    does not share with the call before. Threads may share an instance; their calls go one at a time. An
    iterator whose cache another call has taken over raises Qwen2VLError.
    """

    def __init__(
        self,
        native: _native.Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        processor: ImageProcessor,
        sampling: Sampling,
        n_ctx: int | None = None,
    ) -> None:
        """From its parts; `from_gguf` is the usual way."""
        self.config = Qwen2VLConfig.from_native(
            native.config, tokenizer.special_tokens, tokenizer.eos_token_ids
        )
        self.tokenizer = tokenizer
        self.template = template
        self.image_processor = processor
        self.sampling = sampling
        self.n_ctx = n_ctx or min(self.config.text_config.max_position_embeddings, TRAINED_CONTEXT)
        self._native = native
        self._generation = Generation(native, self.config, processor, self.n_ctx)

    @classmethod
    def from_gguf(
        cls,
        path: str | os.PathLike[str],
        n_threads: int | None = None,
        n_ctx: int | None = None,
        precision: Literal["fast", "exact"] = "fast",
        *,
        mmproj: str | os.PathLike[str] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> Qwen2VL:
        """Loads a GGUF file.

        n_threads: None for the physical cores that this process may use. n_ctx: cells of context at most,
        None for what the model was trained for; memory is taken as cells are used. precision: "exact"
        computes in float32 throughout, "fast" may quantize activations to 8 bits per block. mmproj: the
        vision tower's file where it is not in the model's own. min_pixels, max_pixels: bounds of an image's
        size instead of the file's. device: "cpu", "cuda" (the first), "cuda:N", or "auto" (cuda where it
        works, else the CPU; `note` then says why). The vision tower is read when the first picture comes:
        until then its file has to stay as it is. The environment variable QWEN2VL_ISA forces an instruction
        set.

        Raises OSError or Qwen2VLError for a file that cannot be read, FormatError for one that is damaged,
        UnsupportedError for another architecture, DeviceError for a device that is not there or lacks memory,
        ValueError for an argument out of range.
        """
        path = os.fspath(path)
        require_name(device)
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"n_ctx: expected a positive number of cells, found {n_ctx}")
        metadata = _native.GgufFile(path).metadata
        _require_architecture(metadata, path)
        vision_path = path if mmproj is None else os.fspath(mmproj)
        vision_metadata = metadata if mmproj is None else _native.GgufFile(vision_path).metadata
        tokenizer = Tokenizer.from_metadata(metadata, path)
        template = metadata.get("tokenizer.chat_template", DEFAULT_TEMPLATE)
        if not isinstance(template, str):
            raise FormatError(
                f"{path}: tokenizer.chat_template: expected a string, found {type(template).__name__}"
            )
        compiled = ChatTemplate(template, f"{path}: tokenizer.chat_template")
        sampling = Sampling.from_metadata(metadata, path)
        processor = ImageProcessor.from_metadata(vision_metadata, vision_path).bounded(min_pixels, max_pixels)
        native = _native.Model(
            path,
            mmproj=None if mmproj is None else vision_path,
            n_threads=n_threads or 0,
            precision=precision,
            isa=os.environ.get("QWEN2VL_ISA", ""),
            progress=stage(progress, "load"),
            device=device,
            plugin=plugin_for(device),
        )
        vision = native.config["vision_config"]
        if vision is not None:
            if vision["in_channels"] != 3:
                raise UnsupportedError(
                    f"{vision_path}: expected 3 colour channels, found {vision['in_channels']}"
                )
            processor = replace(
                processor,
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                merge_size=vision["spatial_merge_size"],
            )
        return cls(native, tokenizer, compiled, processor, sampling, n_ctx)

    @property
    def device(self) -> str:
        """ "cpu", or the name of the device that computes."""
        return self._native.device

    @property
    def note(self) -> str:
        """A warning about where the model computes, or "": layers that have no room on the device."""
        return self._native.note

    @property
    def isa(self) -> str:
        """The instruction set that the kernels use, or the device's name."""
        return self._native.isa

    @property
    def n_threads(self) -> int:
        """Of the CPU; 0 where another device computes."""
        return self._native.n_threads

    @property
    def precision(self) -> str:
        return self._native.precision

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take: the vision tower's from the first picture on."""
        return self._native.weight_bytes

    @property
    def last_stats(self) -> GenerationStats:
        """What the latest `generate` or `chat` has taken so far."""
        return self._generation.stats

    def __repr__(self) -> str:
        text = self.config.text_config
        threads = f"{self.n_threads} threads, " if self.n_threads else ""
        return (
            f"Qwen2VL({text.num_hidden_layers} layers of {text.hidden_size}, {self.precision}, "
            f"{self.isa}, {threads}n_ctx={self.n_ctx})"
        )

    # --- text ---

    def tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of a text. What spells a special token stays text unless `parse_special` is set."""
        return self.tokenizer.encode(text, parse_special)

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; what is not UTF-8 becomes U+FFFD. ValueError for an id out of range."""
        return self.tokenizer.decode(ids, skip_special)

    # --- images ---

    def load_image(
        self, image: ImageInput, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ProcessedImage:
        """Reads and resizes a picture once, for any number of calls that take images.

        The bounds replace the model's own for this picture. Errors as of `image_processor.load_image`.
        """
        if self.config.vision_config is None:
            raise UnsupportedError("this model file has no vision tower; give the tower's file as mmproj")
        return self.image_processor.bounded(min_pixels, max_pixels).process(read_source(image))

    def encode_image(self, image: ImageInput, progress: Progress | None = None) -> NDArray[np.float32]:
        """The vision tower's output, float32 [n_tokens, hidden_size]: a row for merge**2 patches of the grid.

        `image`: a path, an encoded file's bytes, a PIL image, uint8 [h, w, 3], or what `load_image` returned.
        """
        return self._generation.embed(self.load_image(image), progress).copy()

    # --- tokens ---

    def logits(
        self, token_ids: TokenIds, images: Iterable[ImageInput] = (), progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """float32 [len(token_ids), vocab_size]: row i predicts the token after token i.

        Each image stands in `token_ids` as its run of pad tokens (`config.image_token_id`, one per merged
        patch), in order. ValueError where they do not fit, or where the prompt is longer than n_ctx. The
        conversation's cache is neither used nor touched.
        """
        prepared = self._generation.prepare(token_ids, [self.load_image(image) for image in images])
        return self._generation.logits(prepared, progress)

    def position_ids(
        self, token_ids: TokenIds, grids: Iterable[tuple[int, int, int]] = ()
    ) -> NDArray[np.int64]:
        """M-RoPE indices (temporal, row, column), int64 [3, len(token_ids)].

        `grids`: (t, h, w) in patches of each vision item, in the order of its run of pad tokens.
        """
        return self._native.position_ids(self._generation.as_ids(token_ids), [(t, h, w) for t, h, w in grids])

    def generate(
        self,
        token_ids: TokenIds,
        images: Iterable[ImageInput] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Token ids that continue `token_ids`, one by one.

        Ends after an end-of-turn token (which is given out too; not with ignore_eos), after the token that
        completes one of the `stop` strings, after max_new_tokens, or where the context is full. temperature 0
        is greedy; a seed of None is drawn anew. Arguments are checked at once (errors as of `logits`);
        computation begins with the first token.
        """
        prepared = self._generation.prepare(token_ids, [self.load_image(image) for image in images])
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        text = TextStream(self.tokenizer, stop, () if ignore_eos else self.config.eos_token_ids)
        steps = self._generation.steps(prepared, sampling.sampler(), max_new_tokens, text, progress)
        return (token for token, _ in steps)

    # --- conversations ---

    def encode_chat(
        self, messages: Iterable[Mapping[str, Any]], add_vision_id: bool = False
    ) -> tuple[list[int], list[ProcessedImage]]:
        """A conversation as the tokens of its prompt, pad tokens expanded, and its images: for `generate`.

        Special tokens come from the template alone: text that spells them stays text.
        """
        conversation = normalize(messages)
        images = [
            self.load_image(part.image, part.min_pixels, part.max_pixels)
            for message in conversation
            for part in message.images
        ]
        pieces = self.template.render(
            [message.for_template() for message in conversation], add_vision_id=add_vision_id
        )
        special = self.tokenizer.special_tokens
        # The model itself writes the markers of found objects, so in its own messages they are tokens again.
        markers = GROUNDING_TOKENS & special.keys()
        allowed = {TEMPLATE: special.keys(), "assistant": markers}
        ids = self.tokenizer.encode_pieces((text, allowed.get(author, ())) for text, author in pieces)
        pad = self.config.image_token_id
        places = sum(token == pad for token in ids)
        if places != len(images):
            raise FormatError(
                f"the chat template has to place {len(images)} image(s), but wrote {places} <|image_pad|>"
            )
        counts = iter([self._generation.token_count(image) for image in images])
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(counts) if token == pad else [token]
        return expanded, images

    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        stream: Literal[True] = True,
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        add_vision_id: bool = ...,
        progress: Progress | None = ...,
        **sampling: float | None,
    ) -> Iterator[str]: ...
    @overload
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        stream: Literal[False],
        *,
        max_new_tokens: int = ...,
        stop: str | Sequence[str] = ...,
        add_vision_id: bool = ...,
        progress: Progress | None = ...,
        **sampling: float | None,
    ) -> str: ...
    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        stream: bool = True,
        *,
        max_new_tokens: int = 1024,
        stop: str | Sequence[str] = (),
        add_vision_id: bool = False,
        progress: Progress | None = None,
        **sampling: float | None,
    ) -> Iterator[str] | str:
        """The model's answer to a conversation: pieces of text as they come, or the whole with stream=False.

        `messages` as transformers and the OpenAI API write them (see `qwen2vl_q.messages`). `sampling`:
        temperature, top_k, top_p, min_p, repetition_penalty and seed as of `generate`; what is not given (or
        None) is the file's own default. add_vision_id numbers the pictures ("Picture 1: "). Arguments are
        checked at once; errors as of `generate`.
        """
        unknown = sampling.keys() - Sampling.__dataclass_fields__.keys()
        if unknown:
            raise TypeError(f"chat() got an unexpected keyword argument {min(unknown)!r}")
        token_ids, images = self.encode_chat(messages, add_vision_id)
        prepared = self._generation.prepare(token_ids, images)
        text = TextStream(self.tokenizer, stop, self.config.eos_token_ids)
        sampler = self.sampling.override(sampling).sampler()
        pieces = _texts(self._generation.steps(prepared, sampler, max_new_tokens, text, progress), text)
        if stream:
            return pieces
        with self._generation.lock:
            return "".join(pieces)

    @contextmanager
    def profile(self) -> Iterator[list[Stage]]:
        """Times the stages of the forward passes inside the `with`; the list is filled when it ends."""
        stages: list[Stage] = []
        self._native.start_profile()
        try:
            yield stages
        finally:
            stages += [Stage(**record) for record in self._native.stop_profile()]

    def read_weights(self) -> int:
        """Reads all weights that decoding a token reads, on the model's threads, and does nothing with them:
        what a token waits for at least. Returns their bytes."""
        return self._native.read_weights()

    def reset(self) -> None:
        """Forgets the conversation's KV cache and the images' embeddings."""
        self._generation.reset()


def _texts(steps: Iterator[tuple[int, str]], text: TextStream) -> Iterator[str]:
    for _, piece in steps:
        if piece:
            yield piece
    if rest := text.finish():
        yield rest


def _require_architecture(metadata: Mapping[str, Any], path: str) -> None:
    found = metadata.get("general.architecture")
    if found == "clip":
        raise UnsupportedError(
            f"{path}: this is a vision tower alone (mmproj); give it beside its language model"
        )
    if found != "qwen2vl":
        raise UnsupportedError(f"{path}: general.architecture: expected 'qwen2vl', found {found!r}")
