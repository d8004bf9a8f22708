"""Which storage type each tensor gets, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen2vl_q._native import block_layout
from qwen2vl_q.checkpoint.tensor_map import Role

FileType = Literal["q4_0", "q8_0", "f16", "bf16", "f32"]
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)

# general.file_type: the numbers of llama.cpp's LLAMA_FTYPE. Only matrices that were packed become q5_0.
FILE_TYPE_NUMBERS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "bf16": 32}

# What a type gives way to where its blocks do not divide a row: at least as many bits, smaller blocks.
_FALLBACKS = {"Q6_K": "Q8_0", "Q8_0": "F16", "Q4_0": "F16"}


@dataclass(frozen=True)
class Recipe:
    """The type of the language model's matrices, and of the vision tower's where that should differ.

    keep_packed: a matrix that is packed in the checkpoint gets the smallest type that holds its integers as
    they are, or Q8_0 where none does.
    """

    type: FileType
    vision_type: FileType | None = None
    keep_packed: bool = False

    def keeps(self, role: Role) -> bool:
        """Whether a packed tensor of this role keeps its integers, if a type holds them."""
        return self.keep_packed and not (role is Role.VISION and self.vision_type)

    def wanted(self, role: Role) -> str:
        """The type of a role, before it is known whether its blocks divide the rows."""
        # 4 bits for the vision tower cost the most accuracy for the least memory: 0.67 of 2.2 G parameters
        # in the 2B model, and its errors enter every visual token. 8 bits are the floor unless asked for.
        vision = self.vision_type or ("q8_0" if self.type == "q4_0" else self.type)
        match role:
            case Role.HEAD:
                return "F32"  # some hundred rows at most, and what they give is compared
            case Role.VECTOR:
                return "F32"  # under 0.1 % of the bytes, and added to or multiplied with every activation
            case Role.LANGUAGE:
                return self.type.upper()
            case Role.EMBEDDING:
                # As llama-quantize does: the head's errors reach the logits directly, and with tied
                # embeddings the same matrix is every token's input.
                return "Q6_K" if self.type == "q4_0" else self.type.upper()
            case Role.VISION:
                return vision.upper()
            case Role.PATCH:
                # Rows of 14 values, 588 for a filter: no block divides either.
                return vision.upper() if vision in ("f32", "bf16") else "F16"


def type_for_row(wanted: str, row: int) -> str:
    """`wanted`, or what it falls back to where its blocks do not divide rows of this many values."""
    while row % block_layout(wanted)[0]:
        wanted = _FALLBACKS[wanted]
    return wanted
