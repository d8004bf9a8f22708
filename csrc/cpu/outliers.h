#pragma once

#include <cstdint>
#include <vector>

#include "cpu/context.h"

namespace qwen2vl::cpu {

/// Outliers: input channels that are far larger than the rest. One of them would set the 8-bit scale
/// of its block of 32 and drown its neighbours, so they are taken out of the quantized rows and multiplied in
/// float32 (LLM.int8(), arXiv 2208.07339).
///
/// Finds the outliers of x [rows, cols] (row stride x_stride): columns whose largest magnitude is more than
/// kOutlierRatio times the mean of all columns' (each counted up to that limit), the largest first, at most
/// one in 32 (of few rows, where a column costs as much as a row: 8). `known_maxima` [cols]: every column's
/// largest magnitude, or nullptr.
std::vector<int32_t> find_outliers(Context& ctx, const float* x, int64_t rows, int64_t cols, int64_t x_stride,
                                   const float* known_maxima = nullptr);

/// Below it the block's scale is at most 6 * 3 / 127 of a normal column's deviation (whose largest of some
/// hundred values is three deviations): an error of 0.2 % of the energy.
inline constexpr float kOutlierRatio = 6;

}  // namespace qwen2vl::cpu
