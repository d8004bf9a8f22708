"""Types of the native core (csrc/bindings)."""

import os
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__version__: str

# As the system takes it: bytes that are not UTF-8 are kept. ValueError: a NUL.
_Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

class Error(Exception):
    """Base of the errors raised by the library."""

class FormatError(Error):
    """A file's content is not what its format says."""

class UnsupportedError(Error):
    """A well-formed input that this build or machine cannot run."""

class DeviceError(Error):
    """A device that was asked for is not there, lacks memory, or failed."""

def supported_isas() -> list[str]:
    """Instruction sets that are built in and that this processor runs, best first; the last is "generic"."""

def default_thread_count() -> int:
    """Fast physical cores allowed by the affinity mask and the cgroup CPU quota."""

def machine() -> dict[str, Any]:
    """What this process may use: logical processors of its affinity mask, cores (SMT siblings counted once),
    fast_cores (where there are two kinds, else all); cpu_quota (processors) and memory_limit (bytes) of its
    cgroup, floats, or None."""

def measure_limits(isa: str = "", n_threads: int = 0, seconds: float = 0.5) -> dict[str, float]:
    """What this machine can do at most in a second, all threads together.

    int8_ops_per_s, float_ops_per_s (bf16 dot products where the instruction set has them, else fp32) and
    fp32_ops_per_s (a multiply and an add are two operations), read_bytes_per_s (of memory that is in no
    cache). isa "": the best one; n_threads 0: default_thread_count(). Each takes `seconds` or a little more;
    the best round counts. Takes 512 MiB of memory meanwhile. ValueError: an argument out of range;
    UnsupportedError: an instruction set that this build or processor lacks.
    """

def plugin_devices(plugin: _Path) -> list[dict[str, Any]]:
    """Devices that a plug-in library finds: name, total_bytes, free_bytes, compute_capability (90 for 9.0),
    multiprocessors. DeviceError, saying why, where there are none or the library is no plug-in."""

def measure_device_limits(plugin: _Path, index: int = 0, seconds: float = 0.5) -> dict[str, float]:
    """What a plug-in's device can do at most in a second: the keys of `measure_limits`, int8_ops_per_s being
    float_ops_per_s (of bf16 matrix products). ValueError: an argument out of range; DeviceError."""

class CacheFullError(Error):
    """The KV cache has no room for more cells."""

# --- quantization -------------------------------------------------------------------------------------

def quantize(
    values: NDArray[np.float32],
    type: str,
    n_threads: int = 0,
    weights: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """float32 [rows, cols] -> uint8 [rows, row_bytes] in GGUF blocks of `type`.

    F16, BF16 and Q8_0 equal gguf.quants bit for bit, Q4_0 without weights too; other blocks have the least
    square error found, each column's times its weight (`weights`: [cols], 0 or more). n_threads 0:
    default_thread_count(). ValueError: another dtype or shape, not contiguous, a row that the blocks do not
    divide, NaN or infinity for blocks or among weights.
    """

def written_types() -> str:
    """The types that `quantize` has, in a list: "F32, F16, ..."."""

def computed_types() -> str:
    """The types that `dequantize` and the engine have, likewise."""

def dequantize(data: NDArray[np.uint8], type: str) -> NDArray[np.float32]:
    """uint8 [rows, row_bytes] -> float32 [rows, cols]."""

def block_layout(type: str) -> tuple[int, int]:
    """(values per block, bytes per block) of a type."""

# --- GGUF ---------------------------------------------------------------------------------------------

class TensorInfo:
    """One entry of `GgufFile.tensors`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """TypeError: only GgufFile makes these."""
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str:
        """As GGUF tools print it ("Q4_0"); also of types that `GgufFile.read` does not support ("IQ4_XS")."""
    @property
    def shape(self) -> tuple[int, ...]:
        """numpy order: the contiguous dimension last."""
    @property
    def offset(self) -> int:
        """From the start of the file, or of the part that it lies in."""
    @property
    def n_bytes(self) -> int: ...

class GgufFile:
    """A checked GGUF file, or all of those that one was split in (NAME-00001-of-00003.gguf ...), of which any
    may be named. Kept open; what is read after it was cut short raises Error."""

    def __init__(self, path: _Path) -> None: ...
    @property
    def version(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def n_bytes(self) -> int:
        """Of the file, or of all its parts."""
    @property
    def metadata(self) -> dict[str, Any]:
        """Key -> int, float, bool, str or list of these; of several parts, the first one's. Strings that are
        not UTF-8 raise FormatError.

        Built anew at each access: keep it."""
    @property
    def entries(self) -> list[tuple[str, bytes]]:
        """Each key and its whole entry (name, type, value) as the file has it."""
    @property
    def tensors(self) -> list[TensorInfo]: ...
    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor, dequantized to float32 in its shape. KeyError: no such tensor; UnsupportedError: a type
        that `quantize` does not know."""
    def raw(self, name: str, begin: int = 0, n_bytes: int | None = None) -> NDArray[np.uint8]:
        """A tensor's bytes as stored (a copy): all, or n_bytes of them from `begin` on. ValueError for more
        than there are."""

def require_language_model(file: GgufFile) -> None:
    """UnsupportedError, saying what the file is, where it is not Qwen2-VL's language model, with or without
    the vision tower."""

def has_vision_tower(file: GgufFile) -> bool:
    """Of whatever model."""

def require_vision_tower(file: GgufFile) -> None:
    """UnsupportedError, saying whose it is, where the file's vision tower is not Qwen2-VL's; FormatError
    where it has none."""

def vision_tower_width(file: GgufFile) -> int:
    """The features of the language model that the file's vision tower is made for."""

def has_swapped_feed_forward(file: GgufFile) -> bool:
    """Whether fc1 is named ffn_down and fc2 ffn_up, as in llama.cpp's files of 2024."""

# --- the engine ---------------------------------------------------------------------------------------

Progress = Callable[[int, int], None]  # (done, total); an exception raised in it cancels the call cleanly

def read_config(path: str, mmproj: str | None = None, any_type: bool = False) -> dict[str, Any]:
    """`Model(path, mmproj).config`, with the errors that its files' content would raise (any_type: but those
    for matrices of a type that is not computed); of the weights it reads norms and biases alone."""

class Model:
    """Weights on a backend, the CPU's or a plug-in's, and the pages of all sequences of it.

    Calls are thread-safe (one runs at a time) and release the GIL. Error: one made by another's callback, or
    in a process that was forked during one; any other forked process may go on with the model.

    Ctrl-C (KeyboardInterrupt) during a call cancels it between layers; sequences stay consistent.
    """

    def __init__(
        self,
        path: _Path,
        mmproj: _Path | None = None,
        n_threads: int = 0,
        precision: Literal["fast", "exact"] = "fast",
        isa: str = "",
        progress: Progress | None = None,
        device: str = "cpu",
        plugin: _Path | None = None,
        device_memory: int = 0,
        updates: AbstractSequence[tuple[str, NDArray[np.float32], NDArray[np.float32]]] = ...,
    ) -> None:
        """device: a backend's name, "cpu" or that of the plug-in's ("cuda", its first device; "cuda:N"), or
        "auto" (the plug-in's where it works, else the CPU). plugin: its library; None: there is none.
        device_memory: bytes of the device's memory that may be used; 0: what is free. updates: (name, a
        [rank, cols], b [rows, rank]) adds b a to a matrix [rows, cols]; names as of `LowRankUpdates` in
        csrc/model/weights.h. Error: n_threads is more than the system gives. ValueError: an update of no
        matrix of the model, or of another shape; UnsupportedError: of a device that does not compute them.
        """
    @property
    def device(self) -> str:
        """ "cpu", or the device's own name."""
    @property
    def note(self) -> str:
        """A warning to the user about where the model computes, or ""."""
    @property
    def config(self) -> dict[str, Any]:
        """Sizes as a nested dict; see qwen2vl_q.engine.config.Qwen2VLConfig for the keys."""
    @property
    def isa(self) -> str:
        """The CPU's instruction set, or the device's own name."""
    @property
    def n_threads(self) -> int:
        """Of the CPU; 0 where another device computes."""
    @property
    def precision(self) -> str: ...
    @property
    def weight_bytes(self) -> int:
        """Memory that the packed weights take: the vision tower's from the first image on."""
    @property
    def max_batch_rows(self) -> int:
        """Rows that a step takes at most."""
    @property
    def can_guess(self) -> bool:
        """Whether rows that are only likely to be wanted cost less than steps of their own."""
    @property
    def cell_bytes(self) -> int:
        """Memory of a cell of the KV cache, about."""
    @property
    def cache_bytes(self) -> int:
        """Memory of the pages of sequences, and of those that are kept to be found again."""
    @property
    def idle_pages(self) -> int:
        """Pages that no sequence uses."""
    def limit_cache(self, bytes: int) -> None:
        """So much memory for pages at most: those that no sequence uses go, the longest unused first, then
        steps raise CacheFullError."""
    def forget(self) -> None:
        """Nothing computed so far will be found again by `SequenceState.adopt`."""
    def start_profile(self) -> None:
        """From here on, the stages of the forward passes are timed."""
    def stop_profile(self) -> list[dict[str, Any]]:
        """The stages since start_profile: name, calls, seconds, and what they had to do at least: int8_ops,
        float_ops (a multiply and an add are two), bytes."""
    def read_weights(self) -> int:
        """Reads all weights that decoding a token reads, and does nothing with them; returns their bytes."""

class Embeddings:
    """The rows of an image or video, which stand in for its pad tokens' own embeddings: float32
    [n, hidden_size], of which Python has a handle."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        """A copy."""
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def numpy(self) -> NDArray[np.float32]:
        """A view, read-only."""

class VisionPass:
    """An image or video on its way through the tower, which begins with the first `advance`. Between two of
    them the model can do anything else; the rows have the same bits however often it is left."""

    def __init__(
        self, model: Model, pixel_values: NDArray[np.float32], grid_thw: tuple[int, int, int]
    ) -> None:
        """Of patches [t*h*w, in_channels*temporal_patch_size*patch_size**2]."""
    @staticmethod
    def of_pixels(
        model: Model, pixels: NDArray[np.uint8], levels: NDArray[np.float32], grid_thw: tuple[int, int, int]
    ) -> VisionPass:
        """Of a still: its pixels [h*patch_size, w*patch_size, in_channels], and what a byte of each channel
        becomes, [in_channels, 256]."""
    def advance(self, seconds: float = ..., progress: Progress | None = None) -> Embeddings | None:
        """Goes on for about so many seconds, by default to the end; the rows [t*h*w/merge**2, hidden_size]
        once they are there. `progress` counts blocks; stopped by it, the pass can go on. A plug-in's device
        computes all at once."""

class Prompt:
    """Token ids with the images and videos that stand in them, checked against the model.

    Each image is (grid_thw, key): its grid in patches, and 16 bytes that identify its pixels (a hash); its
    pad tokens are the next run of them. Raises ValueError for what are no token ids of the model, for more
    than n_ctx of them, and where the runs do not fit the grids.
    """

    def __init__(
        self,
        model: Model,
        token_ids: AbstractSequence[int] | NDArray[np.integer[Any]],
        images: AbstractSequence[tuple[tuple[int, int, int], bytes]] = (),
        n_ctx: int = ...,
    ) -> None: ...
    @property
    def runs(self) -> list[tuple[int, int]]:
        """Of each image the first of its pad tokens, and one past the last."""
    @property
    def positions(self) -> NDArray[np.int64]:
        """M-RoPE indices (temporal, row, column) [3, n]."""
    def __len__(self) -> int: ...
    def common_prefix(self, other: Prompt) -> int:
        """Cells that two prompts begin with."""

class SequenceState:
    """A conversation's cells: some have been computed, the others wait for a step. Its pages go back to the
    model with it. Calls go one at a time, as those of its model; from a callback of its own they raise
    Error."""

    def __init__(self, model: Model, n_ctx: int) -> None: ...
    @property
    def n_cells(self) -> int: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def kv_bytes(self) -> int:
        """Memory of the cache pages in use."""
    @property
    def waiting(self) -> int:
        """Cells that have not been computed."""
    def adopt(self, prompt: Prompt) -> int:
        """Gives its cells back and takes the longest beginning of `prompt` (short of the last token) that any
        sequence of the model has computed; returns its length in cells."""
    def begin(self, prompt: Prompt, embeddings: AbstractSequence[Embeddings | None]) -> None:
        """Lets the other cells of `prompt` wait. embeddings[i] belongs to the prompt's image i; None is
        allowed for one that lies wholly in what has been computed."""
    def push(self, token: int) -> None:
        """Lets one more (text) token wait, behind cells that have all been computed. One that has been
        guessed does not wait: what comes after it is known."""
    def look_up(self, most: int) -> list[int]:
        """What may follow: what followed the last three tokens, or else two, where they stood before; `most`
        tokens, or none."""
    def guess(self, tokens: AbstractSequence[int]) -> int:
        """The next step computes these behind the token that waits, instead of earlier guesses; returns how
        many, since what does not fit into the page of that token is left out. ValueError: none waits, or it
        is a prompt's; not Model.can_guess."""
    def reuse(self, prompt: Prompt) -> int:
        """Keeps the longest common prefix of the cache and `prompt` (short of the last token), drops the
        rest; returns its length in cells."""
    def prefill(
        self,
        prompt: Prompt,
        embeddings: AbstractSequence[Embeddings | None],
        progress: Progress | None = None,
    ) -> None:
        """Evaluates the tokens of `prompt` that `reuse` did not keep. embeddings[i] belongs to the prompt's
        image i; None is allowed for one that lies wholly in the kept part. Cancelled: the cells evaluated so
        far stay."""
    def prefill_logits(
        self,
        prompt: Prompt,
        embeddings: AbstractSequence[Embeddings | None],
        progress: Progress | None = None,
    ) -> NDArray[np.float32]:
        """As prefill, but returns the logits of every evaluated row: float32 [n, vocab_size]."""
    def accept(self, token: int) -> None:
        """Evaluates one more (text) token."""
    @property
    def logits(self) -> NDArray[np.float32]:
        """float32 [vocab_size] after the last cell. ValueError where nothing has been evaluated."""
    def sample(self, sampler: Sampler, allowed: NDArray[np.bool_ | np.uint8] | None = None) -> int:
        """A token from `logits`; the sequence's own tokens count for the repetition penalty. allowed
        [vocab_size]: 0 for tokens that must not be drawn. ValueError: none may be."""
    def log_probabilities(self, token: int, top: int = 0) -> tuple[float, list[tuple[int, float]]]:
        """Natural logarithms of what the model holds probable next, before penalties, masks and temperature:
        a token's, and those of the `top` likeliest by their ids, the likeliest first."""

def step(
    states: AbstractSequence[SequenceState], rows: AbstractSequence[int], progress: Progress | None = None
) -> None:
    """Computes the first rows[i] of the cells that wait in states[i], in one forward pass, whose layers
    `progress` counts. Cancelled, or with CacheFullError: the sequences are as before."""

class Sampler:
    """temperature 0 is greedy (the first of equal logits). Order: repetition penalty, presence and frequency
    (of tokens drawn), bias, repeated n-grams, temperature, top_k, top_p, min_p, draw."""

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        no_repeat_ngram_size: int = 0,
        logit_bias: dict[int, float] = ...,
        seed: int = 0,
    ) -> None: ...
