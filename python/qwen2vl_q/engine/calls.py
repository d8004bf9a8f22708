"""What callers ask of a model, checked: pictures loaded, prompts encoded, options read, requests made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from qwen2vl_q.base.arguments import integer
from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.chat.messages import (
    LOW_DETAIL_PIXELS,
    Fetch,
    ImagePart,
    Messages,
    VideoPart,
    Visual,
    normalize,
    read_source,
)
from qwen2vl_q.chat.tools import CallReader, Tools, as_text
from qwen2vl_q.engine.answer import Answer
from qwen2vl_q.engine.config import Qwen2VLConfig
from qwen2vl_q.engine.generation import Generation, TokenIds
from qwen2vl_q.engine.model_parts import ModelParts
from qwen2vl_q.engine.options import (
    MAX_PROMPT_LOOKUP,
    AnswerOptions,
    CallOptions,
    ChatOptions,
    CompleteOptions,
    GenerateOptions,
    require_known,
    sampling_options,
    top_logprobs,
)
from qwen2vl_q.engine.request import Constraint, Prepared, Request
from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.engine.structured import Grammars, form_of
from qwen2vl_q.text.text_stream import TextStream
from qwen2vl_q.vision.budget import shares
from qwen2vl_q.vision.image_processor import (
    ImageInput,
    ImageProcessor,
    ProcessedImage,
    load_image,
    picture_size,
)
from qwen2vl_q.vision.video import process_video

MAX_ANSWERS = 128  # to one prompt
_PROMPT_LOOKUP = 7  # tokens guessed at a time
_INT32_MAX = 2**31 - 1


class Calls:
    """Of one model."""

    def __init__(
        self,
        generation: Generation,
        config: Qwen2VLConfig,
        parts: ModelParts,
        n_ctx: int,
        fetch: Fetch | None = None,
    ) -> None:
        """fetch: of pictures' addresses."""
        self._fetch = fetch
        self._generation = generation
        self._config = config
        self._parts = parts
        self._n_ctx = n_ctx

    # --- pictures ---

    def load_image(self, part: ImagePart, max_tokens: int) -> ProcessedImage:
        """ValueError for one that takes more tokens."""
        processor = self._processor(part)
        return processor.process(read_source(part.image, fetch=self._fetch), max_tokens, part.resized)

    def load_visuals(self, parts: Iterable[Visual], vision_tokens: int | None = None) -> list[ProcessedImage]:
        """Of one prompt; vision_tokens: of all together, at most: a clip gets an equal share, pictures what
        clips leave. ValueError at the first that the context has no room for."""
        parts = list(parts)
        budget = None if vision_tokens is None else integer("vision_tokens", vision_tokens, 1, _INT32_MAX)
        room = self._n_ctx
        found: dict[int, ProcessedImage] = {}
        clips = [(i, part) for i, part in enumerate(parts) if isinstance(part, VideoPart)]
        for i, clip in clips:
            share = None if budget is None else max(1, budget // len(parts))
            found[i] = self.load_video(clip, room, share)
            room = max(0, room - self._generation.token_count(found[i]))
        pictures = [(i, part) for i, part in enumerate(parts) if isinstance(part, ImagePart)]
        asked = [part for _, part in pictures]
        if budget is not None and asked:
            left = budget - sum(map(self._generation.token_count, found.values()))
            asked = self._fitted(asked, max(0, left))
        for (i, _), part in zip(pictures, asked, strict=True):
            found[i] = self.load_image(part, room)
            room = max(0, room - self._generation.token_count(found[i]))
        return [found[i] for i in range(len(parts))]

    def load_video(
        self, part: VideoPart, max_tokens: int, budget: int | None = None, seconds: float | None = None
    ) -> ProcessedImage:
        """budget: see `vision.video.plan`. ValueError for one that takes more than max_tokens."""
        processor = self._processor(ImagePart(""))
        return process_video(part.video, processor, part.options, max_tokens, budget, seconds)

    def _processor(self, part: ImagePart) -> ImageProcessor:
        """With the part's bounds."""
        if self._config.vision_config is None:
            raise UnsupportedError("this model file has no vision tower; give the tower's file as mmproj")
        processor = self._parts.processor
        most = part.max_pixels
        if most is None and part.detail == "low":
            most = max(LOW_DETAIL_PIXELS, part.min_pixels or processor.min_pixels)
        return processor.bounded(part.min_pixels, most)

    def _fitted(self, parts: list[ImagePart], budget: int) -> list[ImagePart]:
        """With bounds under which they take no more than the budget; processed pictures stay as they are."""
        found, wanted = [], []
        for part in parts:
            image = read_source(part.image, fetch=self._fetch)
            if isinstance(image, ProcessedImage):
                budget -= self._generation.token_count(image)
            else:
                if hasattr(image, "read"):  # once
                    image = load_image(image)
                height, width = part.resized or picture_size(image)[::-1]
                wanted.append(self._processor(part).tokens(width, height))
            found.append(replace(part, image=image))
        given = iter(shares(wanted, budget))
        return [
            part if isinstance(part.image, ProcessedImage) else self._bounded(part, next(given))
            for part in found
        ]

    def _bounded(self, part: ImagePart, tokens: int) -> ImagePart:
        processor = self._processor(part)
        most = min(processor.max_pixels, tokens * (processor.patch_size * processor.merge_size) ** 2)
        return replace(part, min_pixels=min(processor.min_pixels, most), max_pixels=most, detail=None)

    # --- prompts ---

    def prepare(self, token_ids: TokenIds, images: Iterable[ImageInput]) -> Prepared:
        return self._generation.prepare(token_ids, self.load_visuals(map(ImagePart, images)))

    def encode_chat(
        self,
        messages: Messages,
        add_vision_id: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
        vision_tokens: int | None = None,
    ) -> tuple[list[int], list[ProcessedImage]]:
        """The tokens of a conversation's prompt, pad tokens expanded, and its images."""
        conversation = normalize(messages, self._fetch)
        template, tokenizer = self._parts.template, self._parts.tokenizer
        if not template.takes_tools:
            conversation = as_text(conversation, tools)
        elif tools is not None:
            variables = {**(variables or {}), "tools": tools.definitions}
        tokenizer.require_room((text for m in conversation for text in m.texts), self._n_ctx)
        images = self.load_visuals((p for message in conversation for p in message.visuals), vision_tokens)
        pieces = template.render(
            [message.for_template() for message in conversation],
            add_vision_id=add_vision_id,
            variables=variables,
        )
        ids = tokenizer.encode_pieces(pieces)
        config = self._config
        pads = {config.image_token_id, config.video_token_id} - {None}
        places = sum(token in pads for token in ids)
        if places != len(images):
            raise FormatError(
                f"the chat template has to place {len(images)} picture(s) or clip(s), but wrote {places} "
                "<|image_pad|> or <|video_pad|>"
            )
        kept = iter(images)
        expanded: list[int] = []
        for token in ids:
            if token not in pads:
                expanded.append(token)
                continue
            image = next(kept)
            if (token == config.video_token_id) != image.is_video:
                raise FormatError("the chat template has placed a clip as a picture, or a picture as a clip")
            expanded += [token] * self._generation.token_count(image)
        return expanded, images

    # --- requests ---

    def continuation(
        self, token_ids: TokenIds, images: Iterable[ImageInput], options: GenerateOptions
    ) -> Request:
        require_known(options, GenerateOptions, "generate")
        sampling = self._sampling(Sampling(), options)
        ends = () if options.get("ignore_eos") else self._config.eos_token_ids
        text = TextStream(self._parts.tokenizer, options.get("stop"), ends)
        return self._request(self.prepare(token_ids, images), sampling, text, 128, options)

    def answers(
        self,
        conversations: Sequence[Messages],
        n: int,
        details: bool,
        options: ChatOptions,
    ) -> list[Answer]:
        """n to each conversation, side by side."""
        require_known(options, ChatOptions, "chat")
        integer("n", n, 1, MAX_ANSWERS)
        if n * len(conversations) > 1 and options.get("constraint") is not None:
            raise ValueError("constraint: expected one conversation, found a list of them or several answers")
        sampling = self._sampling(self._parts.sampling, options)
        top = top_logprobs(options)
        if top is not None and not details:
            raise ValueError("logprobs: they are among the details: details=True")
        tools = Tools.of(options.get("tools"), options.get("tool_choice"))
        constrain = self._constraints(options, tools)
        names = frozenset(function["name"] for function in tools.functions) if tools else None
        answers = []
        for messages in conversations:
            token_ids, images = self.encode_chat(
                messages,
                options.get("add_vision_id", False),
                options.get("chat_template_kwargs"),
                tools,
                options.get("vision_tokens"),
            )
            prepared = self._generation.prepare(token_ids, images)
            for i in range(n):
                text = self._text(options, self._config.eos_token_ids)
                request = self._request(prepared, sampling, text, 1024, options, constrain(), top, i)
                reader = CallReader(names) if names and details else None
                answers.append(self._generation.answer(request, self._parts.tokenizer, reader))
        return answers

    def completions(
        self, prompt: str | TokenIds, images: Iterable[ImageInput], n: int, options: CompleteOptions
    ) -> list[Answer]:
        """n of what may follow a text or tokens."""
        require_known(options, CompleteOptions, "complete")
        integer("n", n, 1, MAX_ANSWERS)
        if n > 1 and options.get("constraint") is not None:
            raise ValueError("constraint: expected one answer, found several")
        sampling = self._sampling(self._parts.sampling, options)
        top = top_logprobs(options)
        constrain = self._constraints(options, None)
        ends = () if options.get("ignore_eos") else self._config.eos_token_ids
        if isinstance(prompt, str):
            self._parts.tokenizer.require_room([prompt], self._n_ctx)
            prompt = self._parts.tokenizer.encode(prompt)
        prepared = self.prepare(prompt, images)
        return [
            self._generation.answer(
                self._request(
                    prepared, sampling, self._text(options, ends), 1024, options, constrain(), top, i
                ),
                self._parts.tokenizer,
            )
            for i in range(n)
        ]

    def _sampling(self, own: Sampling, options: CallOptions) -> Sampling:
        return own.override(sampling_options(options)).within(self._config.vocab_size)

    def _text(self, options: AnswerOptions, ends: Sequence[int]) -> TextStream:
        """What an answer shows, and where it ends."""
        skip = options.get("skip_special_tokens") is not False
        return TextStream(self._parts.tokenizer, options.get("stop"), ends, skip)

    def _request(
        self,
        prepared: Prepared,
        sampling: Sampling,
        text: TextStream,
        max_new_tokens: int,
        options: CallOptions,
        constraint: Constraint | None = None,
        top: int | None = None,
        nth: int = 0,
    ) -> Request:
        """max_new_tokens: where the options say nothing of it. nth: of several answers."""
        limit = integer("max_new_tokens", options.get("max_new_tokens", max_new_tokens), 1, _INT32_MAX)
        constraint = constraint or options.get("constraint")
        guessed = options.get("prompt_lookup_num_tokens")
        if guessed is None:
            guessed = _PROMPT_LOOKUP
        guessed = integer("prompt_lookup_num_tokens", guessed, 0, MAX_PROMPT_LOOKUP)
        sampler = sampling.sampler(nth)
        return self._generation.request(
            prepared, sampler, limit, text, options.get("progress"), constraint, top, guessed
        )

    def _constraints(self, options: AnswerOptions, tools: Tools | None) -> Callable[[], Constraint | None]:
        form = form_of(options, tools)
        return (lambda: None) if form is None else self._grammars.constraints(form)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._parts.tokenizer, self._config.vocab_size)
