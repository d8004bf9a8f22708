"""The CUDA backend of qwen2vl-q: a shared library in this folder, which qwen2vl_q.engine.devices finds."""
