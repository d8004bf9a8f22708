"""Hugging Face checkpoints to GGUF."""

from qwen2vl_q.convert.convert import ConvertedTensor, Report, convert_checkpoint
from qwen2vl_q.convert.recipe import FILE_TYPES, FileType, Recipe

__all__ = ["FILE_TYPES", "ConvertedTensor", "FileType", "Recipe", "Report", "convert_checkpoint"]
