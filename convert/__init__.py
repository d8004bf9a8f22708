"""Hugging Face checkpoints, and other GGUF files, to GGUF."""

from qwen2vl_q.checkpoint.lora import Adapter
from qwen2vl_q.convert.convert import ConvertedTensor, Report, convert_checkpoint, default_recipe
from qwen2vl_q.convert.pair import merge_models, pair_paths, split_model
from qwen2vl_q.convert.recipe import FILE_TYPES, FileType, Recipe
from qwen2vl_q.convert.requantize import GgufReport, convert_gguf

__all__ = [
    "FILE_TYPES",
    "Adapter",
    "ConvertedTensor",
    "FileType",
    "GgufReport",
    "Recipe",
    "Report",
    "convert_checkpoint",
    "convert_gguf",
    "default_recipe",
    "merge_models",
    "pair_paths",
    "split_model",
]
