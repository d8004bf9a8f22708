"""LoRA adapters as PEFT saves them: for a matrix W of the base an update W + scale * B A."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q.base.errors import FormatError, UnsupportedError
from qwen2vl_q.base.json_files import as_float32, quoted, read_json
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.tensors import FLOATS, Checkpoint, StoredTensor, canonical_name

_MAX_RANK = 1 << 14
_PREFIX = "base_model.model."
# A matrix's two factors, by how their names end. An embedding's are stored transposed.
_FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Settings that make an adapter more than an update and whole tensors, with the values that do not.
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None, {}),
}

# What to do where adding at run time is not enough.
MERGE = "which has to be merged: qwen2vl-q convert --lora"


@dataclass(frozen=True)
class Update:
    """scale * b a is added to the tensor `target`, whose first axis are b's rows."""

    target: str  # canonical name
    a: NDArray[np.float32]  # [rank, values of a row]
    b: NDArray[np.float32]  # [rows, rank]
    scale: float
    magnitude: NDArray[np.float32] | None  # DoRA: the length of each row afterwards

    def apply(self, values: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the target with the update: float32, as shaped."""
        delta = np.float32(self.scale) * (self.b[start:stop] @ self.a)
        updated: NDArray[np.float32] = values + delta.reshape(values.shape)
        if self.magnitude is None:
            return updated
        length = np.linalg.norm(updated, axis=1, keepdims=True)
        scaled: NDArray[np.float32] = updated * (self.magnitude[start:stop, None] / length)
        return scaled


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors. Opening it reads no weights."""

    def __init__(self, folder: Path, scale: float = 1.0):
        """`scale` multiplies the adapter's own. FormatError where its files are damaged or do not fit one
        another, UnsupportedError for a kind of adapter that is not an update."""
        self.folder = folder
        self._config_path = folder / "adapter_config.json"
        if not self._config_path.exists():
            raise FormatError(f"{folder}: no adapter_config.json, so this is not a PEFT adapter")
        self._config = read_json(self._config_path)
        self._own_scale = scale
        self._check_config()
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise FormatError(f"{folder}: no adapter_model.safetensors")
        self._tensors = Checkpoint(folder, [file], lambda n: canonical_name(n.removeprefix(_PREFIX)))
        self._factors, self.whole = self._sorted()
        if scale != 1 and (self.whole or any("magnitude" in f for f in self._factors.values())):
            raise UnsupportedError(
                f"{file}: a scale of {scale:g} is for updates alone: found whole tensors or magnitudes (DoRA)"
            )

    @property
    def targets(self) -> list[str]:
        """The tensors that are updated, by their canonical names."""
        return list(self._factors)

    def leave_out(self, prefix: str) -> None:
        """The tensors whose canonical names begin like this."""
        self._factors = {name: parts for name, parts in self._factors.items() if not name.startswith(prefix)}
        self.whole = {name: stored for name, stored in self.whole.items() if not name.startswith(prefix)}

    def require_updates_alone(self) -> None:
        """UnsupportedError, naming a tensor, where there is more than updates, which only merging can do."""
        magnitudes = [parts["magnitude"] for parts in self._factors.values() if "magnitude" in parts]
        for kind, found in (("a magnitude (DoRA)", magnitudes), ("a whole tensor", [*self.whole.values()])):
            if found:
                raise UnsupportedError(f"{found[0].place}: expected lora_A or _B, found {kind}, {MERGE}")

    @property
    def ties_head(self) -> bool:
        """Whether a head that is tied to the embeddings changes as they do."""
        return self._config.get("ensure_weight_tying") is True

    def summary(self) -> str:
        ranks = sorted({self.rank(target) for target in self._factors})
        rank = "-".join(str(r) for r in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "none"
        whole = f", {len(self.whole)} tensors replaced" if self.whole else ""
        return f"{printable(self.folder.name)}: merged into {len(self._factors)} matrices, rank {rank}{whole}"

    def updates(self) -> Iterator[Update]:
        for target in self._factors:
            yield self.update(target)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares with the base's tensors by canonical name. FormatError where one is not there or is of
        another shape."""
        for target, factors in self._factors.items():
            shape = shapes.get(target)
            a, b = factors["A"], factors["B"]
            if shape is None or len(shape) < 2:
                raise FormatError(f"{b.place}: the base has no matrix {printable(target)}")
            rank = self.rank(target)
            transposed = a.name.endswith("lora_embedding_A")
            rows, columns = (shape[1], shape[0]) if transposed else (shape[0], math.prod(shape[1:]))
            expected = {"A": (a, (rank, columns)), "B": (b, (rows, rank))}
            if "magnitude" in factors:
                expected["magnitude"] = (factors["magnitude"], (rows, 1))
            for stored, (first, second) in expected.values():
                found = (stored.shape[0], math.prod(stored.shape[1:])) if stored.shape else ()
                if found != (first, second):
                    raise FormatError(
                        f"{stored.place}: expected [{first}, {second}], found {printable(list(stored.shape))}"
                    )
            if "magnitude" in factors and (len(shape) != 2 or transposed):
                raise UnsupportedError(f"{b.place}: DoRA is read for linear layers alone")
        for target, stored in self.whole.items():
            if shapes.get(target) != stored.shape:
                expected_shape = list(shapes[target]) if target in shapes else "no such tensor in the base"
                raise FormatError(
                    f"{stored.place}: expected {expected_shape}, found {printable(list(stored.shape))}"
                )

    def check_tied(self) -> None:
        """For a base whose head is its embeddings. UnsupportedError where the two would differ afterwards."""
        head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
        if head in self.whole and embeddings in self.whole:
            first, second = (
                self._tensors.load(self._canonical(self.whole[name])) for name in (head, embeddings)
            )
            if np.array_equal(first, second):
                del self.whole[head]
        alone = embeddings in self._factors and not self.ties_head
        if alone or head in self._factors or head in self.whole:
            raise UnsupportedError(
                f"{self.folder}: the base ties its head to the embeddings, the adapter changes one alone"
            )

    def place(self, target: str) -> str:
        """The file and tensor of an update, for messages."""
        return self._factors[target]["B"].place

    def update(self, target: str) -> Update:
        """FormatError where a factor is not finite."""
        a, b, magnitude = (self._read(target, part) for part in ("A", "B", "magnitude"))
        assert a is not None
        assert b is not None
        if self._factors[target]["A"].name.endswith("lora_embedding_A"):
            a, b = b.T, a.T
        scale = self._own_scale * self._scale(target)
        return Update(target, a, b, scale, None if magnitude is None else magnitude[:, 0])

    def read_whole(self, target: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows of a tensor of `whole`."""
        return self._tensors.read(self._canonical(self.whole[target]), start, stop)

    def _read(self, target: str, part: str) -> NDArray[np.float32] | None:
        stored = self._factors[target].get(part)
        if stored is None:
            return None
        values = self._tensors.read(self._canonical(stored), 0, stored.shape[0]).reshape(stored.shape[0], -1)
        if not np.isfinite(values).all():
            raise FormatError(f"{stored.place} holds values that are not finite")
        return values

    @staticmethod
    def _canonical(stored: StoredTensor) -> str:
        return canonical_name(stored.name.removeprefix(_PREFIX))

    def _sorted(self) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
        """The factors of each updated tensor, and the tensors that replace the base's."""
        factors: dict[str, dict[str, StoredTensor]] = {}
        whole: dict[str, StoredTensor] = {}
        for name, stored in self._tensors.tensors.items():
            if stored.dtype not in FLOATS:
                raise FormatError(f"{stored.place}: expected {', '.join(FLOATS)}, found {stored.dtype}")
            suffix = next((s for s in _FACTORS if name.endswith(s)), None)
            if suffix is not None:
                parts = factors.setdefault(f"{name.removesuffix(suffix)}.weight", {})
                parts[_FACTORS[suffix]] = stored
            elif "lora_" in name or not name.endswith((".weight", ".bias")):
                raise FormatError(f"{stored.place}: expected lora_A, lora_B or a whole weight or bias")
            else:  # modules_to_save, biases; a layer that has an update keeps its own in base_layer
                whole[name.replace(".base_layer.", ".")] = stored
        for parts in factors.values():
            missing = {"A", "B"} - parts.keys()
            if missing:
                stored = next(iter(parts.values()))
                raise FormatError(f"{stored.place}: expected lora_{min(missing)} beside it, found none")
        if not factors and not whole:
            raise FormatError(f"{self.folder}: the adapter is empty")
        return factors, whole

    # --- adapter_config.json ---

    def _check_config(self) -> None:
        for key, plain in _PLAIN.items():
            value = self._config.get(key)
            if value is True or value is False:
                known = any(value is other for other in plain)
            else:
                known = value in plain
            if not known:
                raise UnsupportedError(
                    f"{self._config_path}: {key}: only {quoted(plain[0])} is supported, found {quoted(value)}"
                )
        if not isinstance(self._config.get("use_rslora", False), bool):
            raise self._error("use_rslora", "true or false", self._config["use_rslora"])

    @cached_property
    def _patterns(self) -> dict[str, dict[str, object]]:
        """rank_pattern and alpha_pattern, from modules' names; PEFT takes them for regular expressions."""
        patterns: dict[str, dict[str, object]] = {}
        for key in ("rank_pattern", "alpha_pattern"):
            value = self._config.get(key) or {}
            if not isinstance(value, dict):
                raise self._error(key, "an object", value)
            plain = {name.replace("\\.", "."): number for name, number in value.items()}
            for name in plain:
                if not re.fullmatch(r"\^?[\w.]+\$?", name):
                    raise UnsupportedError(
                        f"{self._config_path}: {key}: only modules' names are supported, found {quoted(name)}"
                    )
            patterns[key] = plain
        return patterns

    def _setting(self, target: str, key: str, pattern: str) -> object:
        """The module's own setting, or the one for all."""
        module = self._factors[target]["A"].name.removeprefix(_PREFIX).partition(".lora_")[0]
        for name, value in self._patterns[pattern].items():
            wanted = name.strip("^$")
            if module == wanted or (name[0] != "^" and module.endswith(f".{wanted}")):
                return value
        return self._config.get(key)

    def rank(self, target: str) -> int:
        rank = self._setting(target, "r", "rank_pattern")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= _MAX_RANK:
            raise self._error("r", f"from 1 to {_MAX_RANK}", rank)
        return rank

    def _scale(self, target: str) -> float:
        alpha = as_float32(self._setting(target, "lora_alpha", "alpha_pattern"))
        if alpha is None or not math.isfinite(alpha):
            raise self._error("lora_alpha", "a number", self._config.get("lora_alpha"))
        rank = self.rank(target)
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _error(self, key: str, expected: str, found: object) -> FormatError:
        return FormatError(f"{self._config_path}: {key}: expected {expected}, found {quoted(found)}")
