"""Hugging Face checkpoints to GGUF."""

from qwen2vl_q.convert.convert import ConvertedTensor, Report, convert_checkpoint, default_recipe
from qwen2vl_q.convert.lora import Adapter
from qwen2vl_q.convert.recipe import FILE_TYPES, FileType, Recipe

__all__ = [
    "FILE_TYPES",
    "Adapter",
    "ConvertedTensor",
    "FileType",
    "Recipe",
    "Report",
    "convert_checkpoint",
    "default_recipe",
]
