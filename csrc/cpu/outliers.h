#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/float_buffer.h"
#include "cpu/kernels/kernel_table.h"

namespace qwen2vl::cpu {

/// Outliers: values of a row that are far larger than the rest, in a few channels of every model. One of them
/// would set the 8-bit scale of its block of 32 and drown its neighbours, so they are taken out of the
/// quantized rows and multiplied in float32 (LLM.int8(), arXiv 2208.07339). What a row's are depends on it
/// alone, whatever stands beside it: the columns that the norm before a layer makes large, and single values.
struct Outlier {
  int64_t row;
  int32_t column;
  float value;
};

/// The magnitude from which a value of `row` [cols] is an outlier: kOutlierRatio times the mean magnitude,
/// each counted up to that limit; infinity where there is none. Fills `maxima` [cols / 32] with the blocks'
/// largest.
float outlier_limit(const KernelTable& kernels, const float* row, int64_t cols, float* maxima);

/// Takes the values above `limit` out of a row, at most one in kMostOutliersIn of them (but kFewOutliers),
/// the largest first: appends them to `found` as of row `index` and leaves zeros. `maxima` as outlier_limit
/// has left them.
void take_outliers(float* row, int64_t cols, const float* maxima, float limit, int64_t index,
                   std::vector<Outlier>& found);

/// The channels that a norm's weights [cols] make kNormRatio times as large as they make others, the largest
/// first where more than one in kMostOutliersIn are.
std::vector<int32_t> outlier_columns(std::span<const float> norm_weights);

/// Takes these columns out of a row likewise.
void take_columns(float* row, std::span<const int32_t> columns, int64_t index, std::vector<Outlier>& found);

/// The outliers of some rows as a matrix of the columns that have any.
struct OutlierMatrix {
  std::vector<int32_t> columns;
  const float* values = nullptr;  ///< [rows][columns.size()], zero where a row has none there
};
/// Of outliers found in any order; the values lie in `room`.
OutlierMatrix gather_outliers(std::span<const std::vector<Outlier>> found, int64_t rows, FloatBuffer& room);

// 26 deviations of a normal distribution. The products that SwiGLU makes have long tails: fewer than one in
// ten million lies above. At 8, real channels three times the rest would be multiplied in float32 too
// (docs/decisions/0006).
inline constexpr float kOutlierRatio = 32;
// Above those channels of three times the rest.
inline constexpr float kNormRatio = 4;
// One in so many of a row's values, at most: with float32 at a quarter of the 8-bit rate, a layer takes an
// eighth longer then.
inline constexpr int64_t kMostOutliersIn = 32;
// But so many in narrow rows.
inline constexpr int64_t kFewOutliers = 8;
// A limit is a multiple of the mean of magnitudes capped by the limit itself: after so many steps, outliers
// hardly count in it.
inline constexpr int kLimitSteps = 4;

}  // namespace qwen2vl::cpu
