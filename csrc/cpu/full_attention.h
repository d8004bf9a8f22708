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
/// The fast precision multiplies integers where the instruction set gains by it (KernelTable::has_i16_dot):
/// 16 bits, which lose less than bf16, or values and probabilities in 8.
class FullAttention {
 public:
  /// Of values and probabilities, where the set has products of 8 bits.
  enum class ValueBits { Eight, Sixteen };

  FullAttention(int64_t num_heads, int64_t head_dim, ValueBits value_bits)
      : num_heads_(num_heads), head_dim_(head_dim), value_bits_(value_bits) {}
  /// In pieces, beside which other work may go on; one call at a time.
  Pieces operator()(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation);

 private:
  template <typename Tile>
  Pieces run(Context& ctx, float* qkv, int64_t rows, const Rotation& rotation);

  int64_t num_heads_, head_dim_;
  ValueBits value_bits_;
  FloatBuffer packed_;  ///< keys and values of all heads
};

}  // namespace qwen2vl::cpu
