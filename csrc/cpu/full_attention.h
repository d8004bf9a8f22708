#pragma once

#include <cstdint>
#include <vector>

#include "base/pieces.h"
#include "cpu/context.h"

namespace qwen2vl::cpu {

/// The angles that the halves of every head turn by (rotary position embedding).
struct Rotation {
  std::vector<float> cos, sin;  ///< [rows][head_dim / 2]
};

/// Full attention within one sequence of rows (a temporal step of an image): every row sees every row.
/// qkv [rows, 3 * num_heads * head_dim]: queries, keys, values side by side, queries and keys not turned yet;
/// the result replaces the queries.
/// Computed in tiles with a streaming softmax (FlashAttention, arXiv 2205.14135); nothing of size rows^2 is
/// kept.
/// The fast precision multiplies in bf16 where the processor has such dot products, sums and softmax in
/// float32.
class FullAttention {
 public:
  FullAttention(int64_t num_heads, int64_t head_dim) : num_heads_(num_heads), head_dim_(head_dim) {}
  /// In pieces, beside which other work may go on; one call at a time.
  Pieces operator()(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation);

 private:
  template <typename T>
  Pieces run(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation);

  int64_t num_heads_, head_dim_;
  FloatBuffer packed_;  ///< keys and values of all heads
};

}  // namespace qwen2vl::cpu
