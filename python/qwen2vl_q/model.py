"""Qwen2VL: a loaded model, its tokenizer and its template; any number of conversations with it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q import _native
from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.errors import Qwen2VLError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.chat.chat_template import ChatTemplate
from qwen2vl_q.chat.messages import Detail, Fetch, ImagePart, Messages, VideoPart
from qwen2vl_q.chat.tools import Tools
from qwen2vl_q.engine.adapters import AdapterPaths, native_updates, open_adapters
from qwen2vl_q.engine.calls import Calls
from qwen2vl_q.engine.chats import Chats
from qwen2vl_q.engine.config import Qwen2VLConfig
from qwen2vl_q.engine.devices import plugin_for, require_name
from qwen2vl_q.engine.generation import Generation, TokenIds, stage
from qwen2vl_q.engine.model_parts import ModelParts, fitted
from qwen2vl_q.engine.options import ChatOptions, GenerateOptions
from qwen2vl_q.engine.request import Progress
from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.engine.stats import GenerationStats, Stage
from qwen2vl_q.engine.tower_file import TowerFile, TowerPath
from qwen2vl_q.tasks.long_video import DESCRIBE, PART_SECONDS, PART_TOKENS, Part, VideoNotes, Watching, watch
from qwen2vl_q.text.tokenizer import Tokenizer
from qwen2vl_q.vision.image_processor import ImageInput, ImageProcessor, ProcessedImage
from qwen2vl_q.vision.video import VideoInput, VideoOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qwen2vl_q.vision.fetch import Fetcher

TRAINED_CONTEXT = 32768
MOST_CELLS = 2**24
CACHE_BYTES = 2**30  # of the KV cache, where one context takes less

_INT32_MAX = 2**31 - 1
_SHOWN_FILES = 3  # in a note


class Qwen2VL(Chats):
    """A Qwen2-VL model on this machine's CPU or a GPU.

    Any number of calls of `generate` and `chat` may be under way at once, from threads and from asyncio:
    their tokens are computed together. What one of them has computed, a system prompt, a picture, a turn of
    a conversation, is found again by every later one that begins with it.

    There is no thread of its own: of the callers that wait for a token, one computes the next ones of all.
    `progress` callbacks run on that caller's thread, and an exception raised in one ends its own call alone.
    """

    def __init__(
        self,
        native: _native.Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        processor: ImageProcessor,
        sampling: Sampling,
        n_ctx: int | None = None,
        cache_bytes: int | None = None,
        fetch: Fetch | None = None,
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
        # A context and a quarter: pages are copied where sequences part.
        native.limit_cache(cache_bytes or max(CACHE_BYTES, self.n_ctx * native.cell_bytes * 5 // 4))
        self.mmproj: str | None = None  # the vision tower's file, where it is not the model's own
        self._passed_over: Sequence[str] = ()
        self._native = native
        self._generation = Generation(native, self.config, processor, self.n_ctx)
        parts = ModelParts(tokenizer, template, sampling, processor)
        self._calls = Calls(self._generation, self.config, parts, self.n_ctx, fetch)

    @classmethod
    def from_gguf(
        cls,
        path: str | os.PathLike[str],
        n_threads: int | None = None,
        n_ctx: int | None = None,
        precision: Literal["fast", "exact"] = "fast",
        *,
        mmproj: TowerPath = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str = "cpu",
        cache_bytes: int | None = None,
        lora: AdapterPaths = (),
        fetch: Fetcher | bool = False,
        progress: Progress | None = None,
    ) -> Qwen2VL:
        """Loads a GGUF file.

        n_threads: None for the physical cores that this process may use. n_ctx: cells of context at most,
        None for what the model was trained for; memory is taken as cells are used. cache_bytes: of the cells
        of all calls at most, None for 1 GiB or what n_ctx needs; where calls under way need more, the newest
        waits for another's end, and raises CacheFullError where none of them goes on. precision: "exact"
        computes in float32 throughout, "fast" may quantize activations to 8 bits per block. mmproj: the
        vision tower's file where it is not in the model's own; None: the one beside it under a usual name
        (mmproj-*.gguf, *-vision.gguf ...), which `mmproj` tells afterwards; False: none. min_pixels,
        max_pixels: bounds of an image's size instead of the file's. device: "cpu", "cuda" (the first),
        "cuda:N", or "auto" (cuda where it works, else the CPU; `note` then says why). lora: folders of PEFT
        adapters, each perhaps with a number that multiplies its own scale: (folder, 0.5). What they add is
        computed beside the weights, of whatever types these are, on the CPU alone; it belongs to this model,
        so that every call has it and what one has computed is found by the next as ever. fetch: whether
        pictures may be named by http(s) addresses, of any host that is public; a `vision.fetch.Fetcher` says
        of which, and how large and slow they may be. The vision tower is
        read when the first picture comes: until then its file has to stay as it is. The environment variable
        QWEN2VL_ISA forces an instruction set.

        Raises OSError or Qwen2VLError for a file that cannot be read, FormatError for one that is damaged,
        UnsupportedError for another architecture, DeviceError for a device that is not there or lacks memory,
        ValueError for an argument out of range.
        """
        path = os.fspath(path)
        require_name(device)
        if n_ctx is not None:
            n_ctx = integer("n_ctx", n_ctx, 1, MOST_CELLS)
        if n_threads is not None:
            n_threads = integer("n_threads", n_threads, 0, _INT32_MAX)
        if cache_bytes is not None:
            cache_bytes = integer("cache_bytes", cache_bytes, 1, 2**63 - 1)
        if precision not in ("fast", "exact"):
            raise ValueError(f"precision: expected fast or exact, found {printable(precision)}")
        tower = TowerFile.of(path, mmproj)
        vision_path = tower.path or path
        parts = ModelParts.read(path, vision_path)
        processor = parts.processor.bounded(min_pixels, max_pixels)
        adapters = open_adapters(lora)
        native = _native.Model(
            path,
            mmproj=tower.path,
            n_threads=n_threads or 0,
            precision=precision,
            isa=os.environ.get("QWEN2VL_ISA", ""),
            progress=stage(progress, "load"),
            device=device,
            plugin=plugin_for(device),
            updates=native_updates(adapters, _native.read_config(path, tower.path)) if adapters else (),
        )
        processor = fitted(processor, native.config["vision_config"], vision_path)
        model = cls(
            native,
            parts.tokenizer,
            parts.template,
            processor,
            parts.sampling,
            n_ctx,
            cache_bytes,
            _fetch_of(fetch),
        )
        model.mmproj, model._passed_over = tower.path, tower.passed_over
        return model

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        quantization: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> Qwen2VL:
        """A file's path, or a model of the Hugging Face hub: owner/name[:TYPE][@REVISION].

        It comes from the cache, without the network; where that lacks it, a GGUF file with its vision tower
        is fetched, or a checkpoint fetched and converted, once (`qwen2vl-q pull --help` says which, and where
        to). quantization: the type of its weights, Q4_K_M; revision: a branch, a tag or a commit; both may
        stand in the name instead. cache_dir: for everything that is fetched and made, instead of the hub's
        cache and QWEN2VL_CACHE. token: the hub's, None for the one that is logged in. local_files_only: no
        network. `arguments` are `from_gguf`'s; progress is told of "convert", too.

        Raises as `from_gguf`; OSError for what the hub, the network or the disk refuses, UnsupportedError for
        a repository that holds something else.
        """
        from qwen2vl_q.hub.models import Models
        from qwen2vl_q.hub.names import HubName

        if Path(name).exists() or not HubName.reads_as(text := os.fspath(name)):
            return cls.from_gguf(name, **arguments)
        asked = HubName.parse(text)
        asked = replace(asked, type=quantization or asked.type, revision=revision or asked.revision)
        models = Models(cache_dir, token, progress=arguments.get("progress"))
        entry = models.get(asked, local_files_only)
        return cls.from_gguf(entry.model, **{"mmproj": entry.mmproj, **arguments})

    @property
    def device(self) -> str:
        """ "cpu", or the name of the device that computes."""
        return self._native.device

    @property
    def note(self) -> str:
        """A warning, or "": layers that have no room on the device, files that are named like the model's
        vision tower and are not."""
        shown = [f"passed over: {reason}" for reason in self._passed_over[:_SHOWN_FILES]]
        if more := len(self._passed_over) - len(shown):
            shown.append(f"and {more} more")
        return "; ".join(note for note in (self._native.note, *shown) if note)

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
        if isinstance(self._native, _Closed):
            return "Qwen2VL(closed)"
        text = self.config.text_config
        threads = f"{self.n_threads} threads, " if self.n_threads else ""
        return (
            f"Qwen2VL({text.num_hidden_layers} layers of {text.hidden_size}, {self.precision}, "
            f"{self.isa}, {threads}n_ctx={self.n_ctx})"
        )

    def __enter__(self) -> Qwen2VL:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call that is under way, with Qwen2VLError, and gives the memory back. Other calls raise
        Qwen2VLError from then on."""
        if isinstance(self._native, _Closed):
            return
        self._generation.scheduler.end_all(Qwen2VLError(_CLOSED))
        closed: Any = _Closed()
        self._native = self._generation = self._calls = closed

    # --- text ---

    def tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        """Token ids of a text. What spells a special token stays text unless `parse_special` is set."""
        return self.tokenizer.encode(text, parse_special)

    def detokenize(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; what is not UTF-8 becomes U+FFFD. ValueError for an id out of range."""
        return self.tokenizer.decode(ids, skip_special)

    # --- images ---

    def load_image(
        self,
        image: ImageInput,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resized: tuple[int, int] | None = None,
        detail: Detail | None = None,
        max_tokens: int | None = None,
    ) -> ProcessedImage:
        """Reads and resizes a picture once, for any number of calls that take images.

        The bounds replace the model's own for this picture, or bring it near to `resized` (height, width);
        of detail as of messages. It takes prod(grid_thw) // merge_size**2 tokens. Errors as of
        `image_processor.load_image`, and ValueError, before it is resized, for more than max_tokens (None:
        n_ctx).
        """
        part = ImagePart(image, min_pixels, max_pixels, resized, detail)
        return self._calls.load_image(part, self.n_ctx if max_tokens is None else max_tokens)

    def load_images(
        self, images: Iterable[ImageInput | ImagePart | VideoPart], vision_tokens: int | None = None
    ) -> list[ProcessedImage]:
        """`load_image` of several, with clips among them as `VideoPart`; vision_tokens: that they may take
        together. All get the same share, and what small ones and clips leave goes to the other pictures."""
        parts = [image if isinstance(image, (ImagePart, VideoPart)) else ImagePart(image) for image in images]
        return self._calls.load_visuals(parts, vision_tokens)

    def load_video(
        self,
        video: VideoInput,
        options: VideoOptions | None = None,
        vision_tokens: int | None = None,
        max_tokens: int | None = None,
        seconds: float | None = None,
    ) -> ProcessedImage:
        """A clip (extra: video), for any number of calls that take images; in messages it is the "video" of a
        part. video: a file, its bytes, or pictures in a row, which all count.

        options: which frames, and their size; without, those of qwen-vl-utils: two frames a second, 768 at
        most. vision_tokens: that it may take; frames get smaller for it, then fewer. seconds:
        that decoding may take (None: 120 a frame). Errors of `vision.video.process_video`, among them
        ValueError for more than max_tokens (None: n_ctx).
        """
        part = VideoPart(video, options or VideoOptions())
        most = self.n_ctx if max_tokens is None else max_tokens
        return self._calls.load_video(part, most, vision_tokens, seconds)

    def load_pages(
        self,
        document: str | os.PathLike[str] | bytes,
        pages: str | None = None,
        vision_tokens: int | None = None,
    ) -> list[ProcessedImage]:
        """Pages of a PDF (extra: pdf) or a TIFF, for any number of calls that take images.

        pages: "3", "3-5", "1,4-", None for all; 64 at most. vision_tokens: that they may take together.
        Errors of `vision.documents.load_pages`.
        """
        from qwen2vl_q.vision.documents import load_pages

        return self.load_images([page for _, page in load_pages(document, pages)], vision_tokens)

    def video(
        self,
        video: str | os.PathLike[str],
        question: str | None = None,
        *,
        part_seconds: float = PART_SECONDS,
        part_tokens: int = PART_TOKENS,
        describe: str | None = None,
        fps: float | None = None,
        notes: str | os.PathLike[str] | None = None,
        on_part: Callable[[Part], None] | None = None,
        **options: Unpack[ChatOptions],
    ) -> VideoNotes:
        """A video of any length, watched in parts of about part_seconds, each of at most part_tokens: a
        timeline (what `describe` asks of each part), a summary, and the answer to a question, for which the
        parts that matter are seen again.

        notes: a file that keeps what was noted, so that a run that has been cut goes on, and another question
        needs no other look at the whole. on_part is told of each part as it comes. Greedy, where the options,
        `chat`'s, say nothing. Errors of `load_video` and `chat`; FormatError for notes of something else.
        """
        how = Watching(
            part_seconds,
            integer("part_tokens", part_tokens, 1, _INT32_MAX),
            DESCRIBE if describe is None else describe,
            fps,
            repr(self.config),
            options,
        )
        return watch(self, video, question, how, notes, on_part)

    def encode_image(self, image: ImageInput, progress: Progress | None = None) -> NDArray[np.float32]:
        """The vision tower's output, float32 [n_tokens, hidden_size]: a row for merge**2 patches of the grid.

        `image`: a path, an encoded file's bytes, a binary file, a PIL image, uint8 [h, w], [h, w, 3] or
        [h, w, 4], or what `load_image` returned.
        """
        return self._generation.embed(self.load_image(image), progress).numpy().copy()

    # --- tokens ---

    def logits(
        self, token_ids: TokenIds, images: Iterable[ImageInput] = (), progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """float32 [len(token_ids), vocab_size]: row i predicts the token after token i.

        Each image stands in `token_ids` as its run of pad tokens (`config.image_token_id`, one per merged
        patch), in order. ValueError where they do not fit, or where the prompt is longer than n_ctx. The
        conversation's cache is neither used nor touched.
        """
        return self._generation.logits(self._calls.prepare(token_ids, images), progress)

    def position_ids(
        self, token_ids: TokenIds, grids: Iterable[tuple[int, int, int]] = ()
    ) -> NDArray[np.int64]:
        """M-RoPE indices (temporal, row, column), int64 [3, len(token_ids)].

        `grids`: (t, h, w) in patches of each vision item, in the order of its run of pad tokens.
        """
        sizes = [
            (integer("t", t, 1, _INT32_MAX), integer("h", h, 1, _INT32_MAX), integer("w", w, 1, _INT32_MAX))
            for t, h, w in grids
        ]
        return self._generation.positions(token_ids, sizes)

    def generate(
        self, token_ids: TokenIds, images: Iterable[ImageInput] = (), **options: Unpack[GenerateOptions]
    ) -> Iterator[int]:
        """Token ids that continue `token_ids`, one by one.

        Ends after an end-of-turn token (which is given out too; not with ignore_eos), after the token that
        completes one of the `stop` strings, after max_new_tokens (128), or where the context is full. How
        tokens are drawn (greedily, if nothing is said) and the other options: `GenerateOptions`. Arguments
        are checked at once (errors as of `logits`); computation begins with the first token.
        """
        return self._generation.tokens(self._calls.continuation(token_ids, images, options))

    def agenerate(
        self, token_ids: TokenIds, images: Iterable[ImageInput] = (), **options: Unpack[GenerateOptions]
    ) -> AsyncIterator[int]:
        """`generate` for asyncio. Where its task is cancelled, or it is closed (`aclose`), the call ends."""
        return self._generation.tokens_async(self._calls.continuation(token_ids, images, options))

    # --- conversations ---

    def encode_chat(
        self,
        messages: Messages,
        add_vision_id: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> tuple[list[int], list[ProcessedImage]]:
        """A conversation as the tokens of its prompt, pad tokens expanded, and its images: for `generate`.

        chat_template_kwargs: variables of the file's own template (texts, numbers, lists, objects). tools: as
        of `chat`.

        Special tokens come from the template alone: text that spells them stays text.
        """
        found = Tools.of(tools)
        return self._calls.encode_chat(messages, add_vision_id, chat_template_kwargs, found)

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
        """Forgets what has been computed, and the images' embeddings. Calls under way go on."""
        self._generation.reset()


def _fetch_of(fetch: Fetcher | bool) -> Fetch | None:
    if fetch is False:
        return None
    if fetch is True:
        from qwen2vl_q.vision.fetch import Fetcher  # brings ssl in

        fetch = Fetcher(frozenset({"*"}))
    if not callable(getattr(fetch, "fetch", None)):
        raise ValueError(f"fetch: expected True, False or a Fetcher, found {printable(fetch)}")
    return fetch.fetch


_CLOSED = "this model has been closed"


class _Closed:
    """What a closed model has instead of its native parts."""

    def __getattr__(self, name: str) -> Any:
        raise Qwen2VLError(_CLOSED)
