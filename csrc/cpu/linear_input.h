#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/outliers.h"
#include "cpu/packed_linear.h"

namespace qwen2vl::cpu {

/// A layer's input: rows of float32. What becomes of a row depends on it alone and on whether it is one of
/// the decoded.
struct InputRows {
  const float* data = nullptr;
  int64_t rows = 0;
  int64_t stride = 0;
  int64_t decoded = 0;  ///< so many of the rows, the first: of tokens that were drawn, one at a time

  InputRows first(int64_t n) const { return {data, n, stride, std::min(n, decoded)}; }
  InputRows after(int64_t n) const {
    return {data + n * stride, rows - n, stride, std::max<int64_t>(0, decoded - n)};
  }
};

/// A vector near a layer's input rows and what the layer makes of it: rows less the mean are smaller and lose
/// less in 8 bits, and layer(x) = weight (x - mean) + layer(mean).
struct Center {
  Vector mean;    ///< [in_features]; empty: rows are taken as they are
  Vector output;  ///< [out_features], bias included, updates not: these take the rows as they are
};

/// Whether a layer's rows go through KernelTable::matmul_groups, but for decoded ones. That costs less than
/// it saves from 45 rows on; fewer go the same way, so that a row's result does not depend on how many there
/// are.
bool has_groups(const Context& ctx, const PackedLinear& layer);

/// What the quantized parts of a layer multiply: the rows in 8 bits, less their outlier columns, and these.
struct QuantizedInput {
  QuantizedRows rows;   ///< of two planes where a part is fine
  GroupedRows grouped;  ///< instead, where these have rows
  OutlierMatrix outliers;
};

/// `fine`: in 16 bits. Valid until the next call, as the context's buffers are.
QuantizedInput quantize_input(Context& ctx, const PackedLinear& layer, const InputRows& x, bool fine,
                              const Center& center);

}  // namespace qwen2vl::cpu
