#pragma once

#include <cstdint>
#include <span>

#include "cpu/context.h"
#include "cpu/kv_cache.h"

namespace qwen2vl::cpu {

/// Full attention within one sequence of rows (a temporal step of an image): every row sees every row.
/// qkv [rows, 3 * num_heads * head_dim]: queries, keys, values side by side; the result replaces the queries.
/// Computed in tiles with a streaming softmax (FlashAttention, arXiv 2205.14135); nothing of size rows^2 is
/// kept.
/// The fast precision multiplies in bf16 where the processor has such dot products, sums and softmax in
/// float32.
class FullAttention {
 public:
  FullAttention(int64_t num_heads, int64_t head_dim) : num_heads_(num_heads), head_dim_(head_dim) {}
  void operator()(Context& ctx, float* qkv, int64_t rows);
  void release_buffers() { packed_.release(); }

 private:
  template <typename T>
  void run(Context& ctx, float* qkv, int64_t rows);

  int64_t num_heads_, head_dim_;
  FloatBuffer packed_;  ///< keys and values of the heads at work
};

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
