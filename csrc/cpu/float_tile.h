#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/full_tile.h"

namespace qwen2vl::cpu {

/// Keys and values of all heads in panels, as float32.
class FloatHeads {
 public:
  FloatHeads(FloatBuffer& buffer, const FullRows& x)
      : value_panel_(x.rows * kPanelRows),
        key_size_(panels(x.rows) * kPanelRows * x.head_dim),
        head_size_(key_size_ + panels(x.head_dim) * value_panel_),
        packed_(buffer.resize(x.num_heads * head_size_)) {}

  /// [ceil(rows / 16)] panels of head_dim x 16 keys.
  float* keys(int64_t h) const { return packed_ + h * head_size_; }
  /// [ceil(head_dim / 16)] panels of rows x 16 dims.
  float* values(int64_t h) const { return keys(h) + key_size_; }
  int64_t value_panel() const { return value_panel_; }

  // All heads of a row before the next row: rows are long, and a head's share of one is a few cache lines.
  void pack(Context& ctx, const FullRows& x) const {
    ctx.pool.parallel_for(panels(x.rows), 4, [&](int64_t begin, int64_t end, int) {
      std::vector<float> keys(kPanelRows * x.head_dim);
      for (int64_t p = begin; p < end; ++p) {
        const int64_t row = p * kPanelRows, n = std::min(kPanelRows, x.rows - row);
        for (int64_t h = 0; h < x.num_heads; ++h) {
          for (int64_t r = 0; r < n; ++r)
            x.rotate(ctx.kernels, x.key(row + r, h), row + r, keys.data() + r * x.head_dim);
          pack_rows(x, keys.data(), row, n, h);
        }
      }
    });
  }

 private:
  /// Rows [row, row + n) of head h, n <= 16, their keys [n][head_dim] turned. What fills up the last panels
  /// is zero.
  void pack_rows(const FullRows& x, const float* k, int64_t row, int64_t n, int64_t h) const {
    float* key = keys(h) + row * x.head_dim;
    for (int64_t d = 0; d < x.head_dim; ++d)
      for (int64_t r = 0; r < kPanelRows; ++r) key[d * kPanelRows + r] = r < n ? k[r * x.head_dim + d] : 0.0f;
    float* value = values(h) + row * kPanelRows;
    for (int64_t d = 0; d < x.head_dim; d += kPanelRows, value += value_panel_) {
      const int64_t dims = std::min(kPanelRows, x.head_dim - d);
      std::memset(value, 0, static_cast<size_t>(n * kPanelRows) * sizeof(float));
      for (int64_t r = 0; r < n; ++r)
        std::memcpy(value + r * kPanelRows, x.value(row + r, h) + d,
                    static_cast<size_t>(dims) * sizeof(float));
    }
  }

  int64_t value_panel_, key_size_, head_size_;
  float* packed_;
};

/// Queries of one head against all of its keys; the result replaces them.
class FloatTile {
 public:
  using Heads = FloatHeads;

  static size_t scratch_bytes(int64_t head_dim) { return Tile::bytes(kTileRows, kKeys, head_dim, head_dim); }
  FloatTile(const KernelTable& kernels, int64_t head_dim, std::byte* scratch)
      : kernels_(kernels), head_dim_(head_dim), tile_(scratch, kTileRows, kKeys, head_dim, head_dim) {}

  /// Of head h, from `first_row` on.
  void operator()(const FullRows& x, const Heads& heads, int64_t h, int64_t first_row, int64_t rows) {
    tile_.start(rows, head_dim_);
    for (int64_t r = 0; r < rows; ++r)
      x.rotate(kernels_, x.query(first_row + r, h), first_row + r, tile_.queries + r * head_dim_);
    for (int64_t key = 0; key < x.rows; key += kKeys) {
      const int64_t n = std::min(kKeys, x.rows - key);
      for (int64_t begin = 0; begin < rows; begin += kNearRows) {
        const int64_t end = std::min(begin + kNearRows, rows);
        multiply_keys(begin, end, n, heads.keys(h) + key * head_dim_);
        softmax(begin, end, n);
      }
      kernels_.gemm_f32(tile_.scores, kKeys, heads.values(h) + key * kPanelRows, heads.value_panel(), rows,
                        head_dim_, n, {tile_.output, head_dim_, nullptr, Store::Accumulate});
    }
    for (int64_t r = 0; r < rows; ++r) {
      kernels_.scale_row(tile_.output + r * head_dim_, 1.0f / tile_.sum[r], head_dim_);
      std::memcpy(x.query(first_row + r, h), tile_.output + r * head_dim_,
                  static_cast<size_t>(head_dim_) * sizeof(float));
    }
  }

 private:
  static constexpr int64_t kKeys = 256;

  void multiply_keys(int64_t begin, int64_t end, int64_t n, const float* keys) {
    kernels_.gemm_f32(tile_.queries + begin * head_dim_, head_dim_, keys, head_dim_ * kPanelRows, end - begin,
                      n, head_dim_, {tile_.scores + begin * kKeys, kKeys, nullptr, Store::Overwrite});
  }

  void softmax(int64_t begin, int64_t end, int64_t n) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    for (int64_t r = begin; r < end; ++r) {
      const float factor =
          kernels_.softmax_step(tile_.scores + r * kKeys, n, scale, tile_.maximum + r, tile_.sum + r);
      if (factor != 1.0f) kernels_.scale_row(tile_.output + r * head_dim_, factor, head_dim_);
    }
  }

  const KernelTable& kernels_;
  int64_t head_dim_;
  Tile tile_;
};

}  // namespace qwen2vl::cpu
