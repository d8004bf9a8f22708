#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/attention_tile.h"
#include "cpu/context.h"
#include "cpu/full_attention.h"

namespace qwen2vl::cpu {

// 100 rows use each key and value that is loaded 100 times. Their probabilities (100 KB for 512 keys in 16
// bits), with 512 keys and values of head_dim 80 in 16 bits (160 KB), stay in a second-level cache of 512 KB;
// in float32 half as many keys do.
inline constexpr int64_t kTileRows = 100;
// The scores of so many rows with 512 keys (20 KB) stay in a first-level cache until they are probabilities.
inline constexpr int64_t kNearRows = 10;

/// The rows of one call of FullAttention.
struct FullRows {
  float* qkv;  ///< [rows][query, key, value][num_heads][head_dim]
  int64_t rows, num_heads, head_dim;
  const Rotation& rotation;

  int64_t width() const { return num_heads * head_dim; }
  int64_t stride() const { return 3 * width(); }
  float* query(int64_t row, int64_t h) const { return qkv + row * stride() + h * head_dim; }
  float* key(int64_t row, int64_t h) const { return query(row, h) + width(); }
  float* value(int64_t row, int64_t h) const { return query(row, h) + 2 * width(); }

  /// x, a row's query or key, turned; `out` may be x.
  void rotate(const KernelTable& kernels, const float* x, int64_t row, float* out) const {
    const int64_t half = head_dim / 2;
    if (out != x) std::memcpy(out, x, static_cast<size_t>(head_dim) * sizeof(float));
    kernels.rope(out, rotation.cos.data() + row * half, rotation.sin.data() + row * half, half);
  }
};

}  // namespace qwen2vl::cpu
