#pragma once

#include <cstdint>
#include <vector>

#include "quant/block_types.h"

namespace qwen2vl {

/// Quantizes `rows` x `cols` float32 values (row-major, contiguous) to `type`, rows packed one after the
/// other at `out` (rows * row_bytes(type, cols) bytes). F16, BF16, Q8_0 and, without weights, Q4_0 are
/// bit-exact with the Python package gguf, to infinities for what is too large. Other blocks are searched for
/// the least square error, each column's times its weight (`weights`: [cols], above 0; nullptr: all weigh the
/// same, as in a dot product with activations about which nothing is known), and cut what is too large. The
/// caller splits rows over threads. Throws std::invalid_argument where a block type is given NaN or infinity,
/// which would take its whole block with it; F16 and BF16 keep them.
void quantize_rows(DType type, const float* values, int64_t rows, int64_t cols, uint8_t* out,
                   const float* weights = nullptr);

/// Weights for quantize_rows of each column's importance, 0 or more: of mean 1, and so far above 0 that a
/// block without any is quantized too. Throws std::invalid_argument for what is negative or not finite.
std::vector<float> search_weights(const float* importance, int64_t cols);

/// The inverse: one row of `cols` values of `type` to float32. The oracle of every kernel.
void dequantize_row(DType type, const uint8_t* row, int64_t cols, float* out);

}  // namespace qwen2vl
