#pragma once

#include <cstdint>
#include <span>

#include "cpu/context.h"
#include "cpu/kv_cache.h"

namespace qwen2vl::cpu {

/// Rows [first_row, first_row + rows) of a batch, whose cells are the last `rows` of first_cell + rows in the
/// cache.
struct CausalRows {
  const PagedKvCache* cache = nullptr;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_cell = 0;
};

/// Causal grouped-query attention over the paged cache. qkv rows hold the rotated queries in their first
/// num_attention_heads * head_dim columns; the result replaces them. The query heads of one key-value head
/// are computed together, so each key and value is read once for all of them.
class CausalAttention {
 public:
  explicit CausalAttention(const TextConfig& config) : config_(config) {}
  void operator()(Context& ctx, int64_t layer, std::span<const CausalRows> sequences, float* qkv,
                  int64_t qkv_stride);

 private:
  TextConfig config_;
  FloatBuffer partial_;  ///< [task][tile rows][head_dim + 2]: unnormalized output, maximum, sum
};

}  // namespace qwen2vl::cpu
