#pragma once

#include <cstdint>

#include "quant/block_types.h"

namespace qwen2vl {

/// Quantizes `rows` x `cols` float32 values (row-major, contiguous) to `type`, rows packed one after the
/// other at `out` (rows * row_bytes(type, cols) bytes). The production quantizer: F16, BF16, Q8_0 and Q4_0
/// are bit-exact with the Python package gguf, to infinities for what is too large; Q6_K searches each
/// sub-block's scale for the least square error and cuts what is too large. Plain code; the caller splits
/// rows over threads. Throws std::invalid_argument where a block type is given NaN or infinity, which would
/// take its whole block with it; F16 and BF16 keep them.
void quantize_rows(DType type, const float* values, int64_t rows, int64_t cols, uint8_t* out);

/// The inverse: one row of `cols` values of `type` to float32. The oracle of every kernel.
void dequantize_row(DType type, const uint8_t* row, int64_t cols, float* out);

}  // namespace qwen2vl
