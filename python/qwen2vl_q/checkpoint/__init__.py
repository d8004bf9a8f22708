"""A checkpoint's files: tensors, their names here and there, adapters."""
