"""Which storage type each tensor gets, and why."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qwen2vl_q._native import block_layout, written_types
from qwen2vl_q.base.errors import FormatError
from qwen2vl_q.base.printable import printable
from qwen2vl_q.checkpoint.tensor_map import Role
from qwen2vl_q.convert.imatrix import Imatrix
from qwen2vl_q.convert.writer import OutputTensor

# A type of all matrices, or one of llama.cpp's mixes: Recipe says what those are.
FileType = Literal[
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m",
    "q5_k_s", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs", "f16", "bf16", "f32",
]  # fmt: skip
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)

# general.file_type: the numbers of llama.cpp's LLAMA_FTYPE.
FILE_TYPE_NUMBERS: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "bf16": 32,
}
_FLOATS = ("F32", "F16", "BF16")

# What a type gives way to where its blocks do not divide a row, as in llama.cpp.
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


@dataclass(frozen=True)
class TextShape:
    """What a mix of types asks of the language model."""

    n_layers: int
    n_groups: int  # query heads for each key and value head
    is_tied: bool  # the embeddings are the head

    @staticmethod
    def of(shapes: Mapping[str, tuple[int, ...]]) -> TextShape:
        """Of a model's tensors by name."""
        layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
        query, key = shapes.get("blk.0.attn_q.weight", (1,)), shapes.get("blk.0.attn_k.weight", (1,))
        return TextShape(len(layers), query[0] // max(1, key[0]), "output.weight" not in shapes)


@dataclass(frozen=True)
class Override:
    """The type of the matrices whose names the pattern is found in."""

    pattern: re.Pattern[str]
    type: str

    @staticmethod
    def of(text: str) -> Override:
        """REGEX=TYPE; ValueError where it is not."""
        regex, equals, type = text.rpartition("=")
        if not equals or not regex:
            raise ValueError(f"expected REGEX=TYPE, found {text!r}")
        if type.upper() not in written_types().split(", "):
            raise ValueError(f"{text!r}: expected a type of {written_types()}, found {type!r}")
        try:
            return Override(re.compile(regex), type.upper())
        except re.error as error:
            raise ValueError(f"{text!r}: not a regular expression: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """The type of the language model's matrices, and of the vision tower's where that should differ.

    Of `overrides` the first that fits counts. With `imatrix` the columns of its tensors are weighted.

    keep_packed: a matrix that is packed in the checkpoint gets the smallest type that holds its integers as
    they are, or Q8_0 where none does.
    """

    type: FileType
    vision_type: FileType | None = None
    overrides: tuple[Override, ...] = ()
    imatrix: Imatrix | None = None
    keep_packed: bool = False

    def keeps(self, role: Role) -> bool:
        """Whether a packed tensor of this role keeps its integers, if a type holds them."""
        return self.keep_packed and not (role is Role.VISION and self.vision_type)

    def wanted(self, role: Role, name: str, shape: TextShape) -> str:
        """The type of a tensor, before it is known whether its blocks divide the rows."""
        if role is Role.VECTOR:
            return "F32"  # under 0.1 % of the bytes, and added to or multiplied with every activation
        for override in self.overrides:
            if override.pattern.search(name):
                return override.type
        # 4 bits for the vision tower cost the most accuracy for the least memory: 0.67 of 2.2 G parameters
        # in the 2B model, and its errors enter every visual token. 8 bits are the floor unless asked for.
        vision = _base(self.vision_type or (self.type if _base(self.type) in _FLOATS else "q8_0"))
        match role:
            case Role.HEAD:
                return "F32"  # some hundred rows at most, and what they give is compared
            case Role.VISION:
                return vision
            case Role.PATCH:
                # Rows of 14 values, 588 for a filter: no block divides either.
                return vision if vision in ("F32", "BF16") else "F16"
        base = _base(self.type)
        if name == "output.weight" or (name == "token_embd.weight" and shape.is_tied):
            # The head's errors reach the logits directly.
            return base if base in (*_FLOATS, "Q8_0") else "Q6_K"
        if not name.startswith("blk."):
            return base
        _, layer, tensor, _ = name.split(".")
        return self._mixed(tensor, int(layer), shape) or base

    def check(self, tensors: Sequence[OutputTensor]) -> None:
        """ValueError for an override that fits no tensor, FormatError for an imatrix of another model."""
        matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
        for override in self.overrides:
            if not any(override.pattern.search(tensor.name) for tensor in matrices):
                raise ValueError(f"'{override.pattern.pattern}={override.type}': no matrix has such a name")
        weights = [self.weights(tensor) for tensor in matrices]
        if self.imatrix is not None and all(found is None for found in weights):
            raise FormatError(
                f"{printable(str(self.imatrix.path), 1000)}: it knows none of the model's tensors"
            )

    def weights(self, tensor: OutputTensor) -> NDArray[np.float32] | None:
        """Of a matrix's columns; None: all weigh the same."""
        if self.imatrix is None or len(tensor.shape) != 2:
            return None
        return self.imatrix.weights(tensor.name, tensor.shape[-1])

    def notes(self, tensors: Sequence[OutputTensor]) -> list[str]:
        """What the user should know of the tensors as they were written."""
        if self.imatrix is None:
            return []
        searched = [t for t in tensors if t.name.startswith("blk.") and t.type not in (*_FLOATS, "Q8_0")]
        missing = [t.name for t in searched if self.weights(t) is None]
        if not missing:
            return []
        return [f"{len(missing)} matrices of layers are not in the importance matrix: {missing[0]} ..."]

    def _mixed(self, tensor: str, layer: int, shape: TextShape) -> str | None:
        """What llama-quantize gives a layer's tensor instead of the file's type."""
        n = shape.n_layers
        is_early, more = layer < n // 8, layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        match self.type, tensor:
            case "q4_k_m" | "q5_k_m", "attn_v" | "ffn_down" if is_early or more:
                return "Q6_K"
            case "q2_k", "attn_v":
                return "Q5_K" if n == 80 else "Q4_K" if shape.n_groups >= 4 else "Q3_K"
            case "q2_k", "ffn_down" | "attn_output":
                return "Q3_K"
            case "q3_k_m", "attn_v":
                return "Q5_K" if layer < 2 or n == 80 else "Q4_K"
            case "q3_k_m", "ffn_down":
                return "Q5_K" if layer < n // 16 else "Q4_K"
            case "q3_k_m", "attn_output":
                return "Q4_K"
            case "q3_k_l", "attn_v" | "ffn_down" | "attn_output":
                return "Q5_K"
            case "iq4_nl" | "iq4_xs", "attn_v" if shape.n_groups >= 4:
                return "Q5_K"
            case "iq4_nl" | "iq4_xs", "ffn_down" if is_early and self.imatrix is None:
                return "Q5_K"
            case "q3_k_s", "attn_v" if n == 80:
                return "Q5_K"
            case "q4_k_m", "attn_v" if n == 80:  # of the 72B, small beside the others
                return "Q5_K"
            case "q4_k_s", "attn_v" if layer < 4 or n == 80:
                return "Q5_K"
            case "q4_k_s", "ffn_down" if is_early:
                return "Q5_K"
            case "q4_0", "ffn_down" if is_early and self.imatrix is not None:
                return "Q4_1"
            case "q5_0", "ffn_down" if is_early and self.imatrix is not None:
                return "Q5_1"
        return None


def _base(type: FileType) -> str:
    """The type that a mix is named after."""
    return re.sub(r"(_K)_[SML]$", r"\1", type.upper())


def type_for_row(wanted: str, row: int) -> str:
    """`wanted`, or what it falls back to where its blocks do not divide rows of this many values."""
    while row % block_layout(wanted)[0]:
        wanted = _FALLBACKS.get(wanted, "F16")
    return wanted
