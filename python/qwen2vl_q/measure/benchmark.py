"""Measures one model in this process: images, prefill, decoding, questions about a photo, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter, time
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.engine.sampling import Sampling
from qwen2vl_q.engine.stats import Stage, peak_memory_bytes
from qwen2vl_q.measure.limits import Limits, mean_stages
from qwen2vl_q.model import Qwen2VL
from qwen2vl_q.vision.image_processor import ImageInput

Part = Literal["image", "question", "prefill", "decode", "sampled", "streams"]
PARTS: tuple[Part, ...] = get_args(Part)
State = TypeVar("State")
GREEDY, SAMPLED = Sampling(seed=0), Sampling(temperature=1.0, top_p=0.9, seed=0)
_SEED = 0
STREAM_PROMPT, _STREAM_WARM_UP = 32, 8  # tokens of each
# Random weights repeat themselves sooner or later: what guessing saves of that is no speed of decoding.
STEP_BY_STEP: dict[str, Any] = {"ignore_eos": True, "prompt_lookup_num_tokens": 0}


@dataclass(frozen=True)
class Settings:
    """What to measure. Sizes are (width, height); `depth` counts the tokens before the first one decoded."""

    model: str
    mmproj: str | None = None
    image: str | None = None
    image_size: tuple[tuple[int, int], ...] = ((1024, 683),)
    prompt_tokens: tuple[int, ...] = (512,)
    depth: tuple[int, ...] = (0,)
    decode_tokens: int = 64
    streams: tuple[int, ...] = (1, 2, 8, 32)  # numbers of calls that decode together
    repeat: int = 3
    threads: int | None = None
    precision: Literal["fast", "exact"] = "fast"
    device: str = "cpu"
    lora: Sequence[tuple[Path, float]] = ()  # adapters with their scales
    only: tuple[Part, ...] = ()  # empty: everything


@dataclass(frozen=True)
class Timing:
    """Seconds of equal runs, the tokens that each went through, and the stages of one: their mean on the CPU,
    those of one more run on a device, where looking at the stages takes time."""

    what: str
    count: int
    seconds: tuple[float, ...]
    stages: tuple[Stage, ...] = ()
    read_rates: tuple[float, ...] = ()  # bytes a second of merely reading the weights, between the runs

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    @property
    def rates(self) -> list[float]:
        """Tokens a second."""
        return [self.count / seconds for seconds in self.seconds]

    def limits(self, machine: Limits) -> Limits:
        """With memory as fast as the model's own weights were read between the runs, where they were."""
        if not self.read_rates:
            return machine
        return replace(machine, read_bytes_per_s=median(self.read_rates))

    def floor(self, machine: Limits) -> float | None:
        """Seconds that this takes at least; None for what has no floor of its own."""
        match self.what.split()[0]:
            case "image":
                return machine.image_floor(self.stages)
            case "prefill":
                return machine.prefill_floor(self.stages)
            case "decode":
                return self.limits(machine).decode_floor(self.stages)
        return None


@dataclass(frozen=True)
class Task(Generic[State]):
    """Something to measure: `run` gets what `prepare` made for it alone, and returns its seconds."""

    what: str
    count: int  # tokens
    prepare: Callable[[], State]
    run: Callable[[State], float]
    waits_for_reads: bool = False  # measured against reads of the weights between its runs


@dataclass(frozen=True)
class Measured:
    """Of one model. Lists are empty for what was not asked for or, without a vision tower, cannot be."""

    isa: str
    n_threads: int
    precision: str
    load_seconds: float
    start_seconds: float  # from the request for a process to the first token of a prompt of one
    vision_load_seconds: float | None = None  # of the vision tower, which the first picture loads
    image: list[Timing] = field(default_factory=list)
    question: list[Timing] = field(default_factory=list)  # first tokens
    prefill: list[Timing] = field(default_factory=list)
    decode: list[Timing] = field(default_factory=list)
    sampled: list[Timing] = field(default_factory=list)  # not greedy: SAMPLED
    streams: list[Timing] = field(default_factory=list)  # tokens of all together
    peak_memory_bytes: int | None = None
    device: str = "cpu"
    note: str = ""  # the model's


def measure(
    settings: Settings, requested_at: float, tell: Callable[[str], None] = lambda _: None
) -> Measured:
    """Loads the model and takes every time `settings.repeat` times. `requested_at`: time.time() before the
    process was started. `tell` hears what is under way."""
    tell("loading")
    started = perf_counter()
    model = Qwen2VL.from_gguf(
        settings.model,
        settings.threads,
        precision=settings.precision,
        mmproj=settings.mmproj,
        device=settings.device,
        lora=settings.lora,
    )
    load_seconds = perf_counter() - started
    bench = Benchmark(model, settings, tell)
    bench.tokens_after(bench.prompt(1), 1)
    start_seconds = time() - requested_at
    wanted = set(settings.only or PARTS)
    if model.config.vision_config is None:
        wanted -= {"image", "question"}
    vision_load_seconds = bench.load_vision() if wanted & {"image", "question"} else None
    timings: dict[str, list[Timing]] = {
        part: bench.questions() if part == "question" else [bench.timing(task) for task in bench.tasks(part)]
        for part in PARTS
        if part in wanted
    }
    return Measured(
        isa=model.isa,
        n_threads=model.n_threads,
        precision=model.precision,
        load_seconds=load_seconds,
        start_seconds=start_seconds,
        vision_load_seconds=vision_load_seconds,
        peak_memory_bytes=peak_memory_bytes(),
        device=model.device,
        note=model.note,
        **timings,
    )


class Benchmark:
    """What is measured of one loaded model, each task from a state that it sets up itself."""

    def __init__(
        self, model: Qwen2VL, settings: Settings, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._model = model
        self._settings = settings
        self._tell = tell
        special = list(model.tokenizer.special_tokens.values())
        self._words = np.setdiff1d(np.arange(len(model.tokenizer)), special)

    def prompt(self, n: int, seed: int = _SEED) -> list[int]:
        """Random tokens, none of them special."""
        tokens: list[int] = np.random.default_rng(seed).choice(self._words, n).tolist()
        return tokens

    def tokens_after(self, prompt: Sequence[int], n: int, images: Sequence[ImageInput] = ()) -> list[int]:
        tokens = list(self._model.generate(prompt, images, max_new_tokens=n, **STEP_BY_STEP))
        if len(tokens) != n:
            raise ValueError(f"{self._settings.model}: the context ended after {len(tokens)} of {n} tokens")
        return tokens

    def timing(self, task: Task[State]) -> Timing:
        self._tell(task.what)
        read_rates: list[float] = []

        def prepare() -> State:
            if task.waits_for_reads:
                read_rates.extend(self.read_rates())
            return task.prepare()

        runs = range(self._settings.repeat)
        if self._model.device == "cpu":
            profiled = [self.profiled(task, prepare()) for _ in runs]
            seconds, stages = [run[0] for run in profiled], mean_stages([run[1] for run in profiled])
        else:
            seconds = [task.run(prepare()) for _ in runs]
            with self._model.profile():  # or the run's first step might be under way before it
                state = task.prepare()
            stages = tuple(self.profiled(task, state)[1])
        if task.waits_for_reads:
            read_rates.extend(self.read_rates())
        return Timing(task.what, task.count, tuple(seconds), stages, tuple(read_rates))

    def tasks(self, part: Part) -> Iterator[Task[Any]]:
        """What the settings ask for of a part; "question" has no tasks."""
        match part:
            case "image":
                yield from map(self.image, self.pictures())
            case "prefill":
                yield from map(self.prefill, self._settings.prompt_tokens)
            case "decode":
                yield from map(self.decode, self._settings.depth)
            case "sampled":
                yield self.decode(self._settings.depth[0], SAMPLED)
            case "streams":
                yield from map(self.streams, self._settings.streams)

    def profiled(self, task: Task[State], state: State) -> tuple[float, list[Stage]]:
        """A run's seconds and its stages."""
        with self._model.profile() as stages:
            seconds = task.run(state)
        return seconds, stages

    def read_rates(self, at_least: float = 0.5) -> tuple[float, ...]:
        """Bytes a second, in the same process and memory as decoding: where pages lie and what neighbours do
        changes the speed of memory by half, from process to process and minute to minute. A device has its
        memory for itself: there the limit counts."""
        if self._model.device != "cpu":
            return ()
        n_bytes, started = 0, perf_counter()
        while (taken := perf_counter() - started) < at_least:
            n_bytes += self._model.read_weights()
        return (n_bytes / taken,)

    # --- the vision tower ---

    def load_vision(self) -> float:
        """Seconds that a model's first picture takes more than a second one of that (least) size."""
        seconds = []
        for _ in range(2):
            self._model.reset()
            started = perf_counter()
            self._model.encode_image(drawn_picture((56, 56)))
            seconds.append(perf_counter() - started)
        return max(seconds[0] - seconds[1], 0.0)

    def pictures(self) -> list[ImageInput]:
        if self._settings.image is not None:
            return [self._settings.image]
        return [drawn_picture(size) for size in self._settings.image_size]

    def image(self, picture: ImageInput) -> Task[None]:
        """The vision tower alone: the picture is read and resized here."""
        image = self._model.load_image(picture)

        def run(_: None) -> float:
            started = perf_counter()
            embeddings = self._model.encode_image(image)
            taken = perf_counter() - started
            if not np.isfinite(embeddings).all():
                raise ValueError(
                    f"{self._settings.model}: the embeddings are not finite: the weights are damaged"
                )
            return taken

        t, rows, columns = image.grid_thw
        patch, merge = self._model.image_processor.patch_size, self._model.image_processor.merge_size
        what = f"image {columns * patch} x {rows * patch}"
        return Task(what, t * rows * columns // merge**2, self._model.reset, run)

    # --- the language model ---

    def prefill(self, n: int) -> Task[None]:
        """From an empty cache to the first token."""
        prompt = self.prompt(n)

        def run(_: None) -> float:
            self.tokens_after(prompt, 1)
            return self._model.last_stats.prefill_seconds

        return Task(f"prefill {n}", n, self._model.reset, run)

    def decode(self, depth: int, sampling: Sampling = GREEDY) -> Task[Iterator[int]]:
        """Tokens one by one, drawing included, after `depth` others (one where it is 0)."""
        model, n = self._model, self._settings.decode_tokens
        prompt = self.prompt(max(depth, 1))

        def prepare() -> Iterator[int]:
            tokens = model.generate(prompt, max_new_tokens=n + 1, **STEP_BY_STEP, **asdict(sampling))
            next(tokens)  # what the first one takes is the prompt's
            return tokens

        def run(tokens: Iterator[int]) -> float:
            if sum(1 for _ in tokens) != n:
                raise ValueError(f"{self._settings.model}: the context ends before {depth} + {n} tokens")
            return model.last_stats.decode_seconds

        what = f"decode at {depth}" + ("" if sampling == GREEDY else ", sampled")
        return Task(what, n, prepare, run, waits_for_reads=True)

    def streams(self, n: int) -> Task[Iterator[tuple[int, ...]]]:
        """Tokens of `n` calls of `generate` that are under way together, taken in turn by one thread."""
        model, steps = self._model, self._settings.decode_tokens
        prompts = [self.prompt(STREAM_PROMPT, seed) for seed in range(n)]

        def prepare() -> Iterator[tuple[int, ...]]:
            options: Any = {"max_new_tokens": _STREAM_WARM_UP + steps, **STEP_BY_STEP}
            requests = [model._calls.continuation(ids, (), options) for ids in prompts]
            for request in requests:  # before the first step, so that all end with the last
                model._generation.scheduler.submit(request)
            tokens = zip(*map(model._generation.tokens, requests), strict=True)
            for _ in range(_STREAM_WARM_UP):
                next(tokens)
            return tokens

        def run(tokens: Iterator[tuple[int, ...]]) -> float:
            started = perf_counter()
            found = sum(1 for _ in tokens)
            taken = perf_counter() - started
            if found != steps:
                raise ValueError(f"{self._settings.model}: the context ended after {found} of {steps} tokens")
            return taken

        return Task(f"{n} stream{'s' * (n > 1)}, decode at {STREAM_PROMPT}", n * steps, prepare, run)

    # --- a conversation ---

    def questions(self) -> list[Timing]:
        """First tokens: of a question about a photo, of the next one, and of a text turn of that length.

        The picture is in memory as pixels; resizing it and tokenizing count.
        """
        self._tell("questions")
        picture = self.pictures()[0]
        first: dict[str, Any] = {
            "role": "user",
            "content": [
                {"type": "image", "image": picture},
                {"type": "text", "text": "What is on the left?"},
            ],
        }
        answer = {"role": "assistant", "content": "A hill in the evening sun."}
        second = {"role": "user", "content": "And what is on the right of it?"}
        photo, again, text, counts = [], [], [], (0, 0)
        for run in range(self._settings.repeat):
            self._model.reset()
            seconds, n_first, _ = self._first_token([first])
            photo.append(seconds)
            seconds, n_second, new = self._first_token([first, answer, second])
            again.append(seconds)
            counts = n_first, new
            self._model.reset()
            before = self.prompt(n_second - new, seed=run)
            self.tokens_after(before, 1)
            started = perf_counter()
            self.tokens_after(before + self.prompt(new, seed=run + self._settings.repeat), 1)
            text.append(perf_counter() - started)
        return [
            Timing("first token, photo", counts[0], tuple(photo)),
            Timing("first token, second question", counts[1], tuple(again)),
            Timing("first token, text of that length", counts[1], tuple(text)),
        ]

    def _first_token(self, messages: list[dict[str, Any]]) -> tuple[float, int, int]:
        """(seconds, tokens of the prompt, those of them that were not in the cache)."""
        started = perf_counter()
        ids, images = self._model.encode_chat(messages)
        self.tokens_after(ids, 1, images)
        taken = perf_counter() - started
        return taken, len(ids), len(ids) - self._model.last_stats.reused_tokens


def drawn_picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Soft colours, edges and grain, as a photo has them: (width, height) -> uint8 [height, width, 3]."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    u, v = x * (1024 / width), y * (683 / height)
    sky = np.stack([90 + v / 8, 120 + u / 16, 200 - v / 6], axis=-1)
    disc = (u - 700) ** 2 + (v - 250) ** 2 < 160**2
    stripes = (np.sin(x / 9 + y / 23) > 0.6) & (v > 400)
    sky[disc] = (230, 180, 60)
    sky[stripes] *= 0.5
    grain = np.random.default_rng(_SEED).normal(0, 6, sky.shape)
    return np.clip(sky + grain, 0, 255).astype(np.uint8)
