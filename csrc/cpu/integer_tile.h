#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/integer_heads.h"

namespace qwen2vl::cpu {

/// Queries of one head against all of its keys; the result replaces them. Products of integers, sums and
/// softmax in float32.
template <typename Value>
class IntegerTile {
 public:
  using Heads = IntegerHeads<Value>;

  static size_t scratch_bytes(int64_t head_dim) {
    const int64_t floats = kNearRows * kIntegerKeys + kTileRows * (head_dim + 4 + kPieces) + head_dim;
    return static_cast<size_t>(floats) * sizeof(float) + kTileRows * kIntegerKeys * sizeof(Probability) +
           static_cast<size_t>(kTileRows * padded(head_dim, kIntegerRoom)) * sizeof(int16_t);
  }

  IntegerTile(const KernelTable& kernels, int64_t head_dim, std::byte* scratch)
      : kernels_(kernels), head_dim_(head_dim), room_(padded(head_dim, kIntegerRoom)) {
    scores_ = reinterpret_cast<float*>(scratch);
    output_ = scores_ + kNearRows * kIntegerKeys;
    maximum_ = output_ + kTileRows * head_dim;
    sum_ = maximum_ + kTileRows;
    factors_ = sum_ + kTileRows;
    query_units_ = factors_ + kTileRows;
    scales_ = query_units_ + kTileRows;
    query_ = scales_ + kPieces * kTileRows;
    queries_ = reinterpret_cast<int16_t*>(query_ + head_dim);
    probabilities_ = reinterpret_cast<Probability*>(queries_ + kTileRows * room_);
  }

  /// Of head h, from `first_row` on.
  void operator()(const FullRows& x, const Heads& heads, int64_t h, int64_t first_row, int64_t rows) {
    start(x, heads.channels().query_factor + h * head_dim_, h, first_row, rows);
    for (int64_t key = 0; key < x.rows; key += kIntegerKeys) {
      const int64_t n = std::min(kIntegerKeys, x.rows - key);
      for (int64_t begin = 0; begin < rows; begin += kNearRows) {
        const int64_t end = std::min(begin + kNearRows, rows);
        kernels_.gemm_i16(queries_ + begin * room_, room_, heads.keys(h) + key * head_dim_,
                          head_dim_ * kPanelRows, end - begin, n, head_dim_, query_units_ + begin,
                          {scores_, kIntegerKeys, nullptr, Store::Overwrite});
        softmax(begin, end, n);
      }
      multiply_values(rows, n, heads.values(h) + key * kPanelRows, heads.value_panel());
    }
    const float* unit = heads.channels().value_unit + h * head_dim_;
    const float* center = heads.channels().value_center + h * head_dim_;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = x.query(first_row + r, h);
      const float inverse = 1.0f / sum_[r];
      for (int64_t d = 0; d < head_dim_; ++d)
        out[d] = output_[r * head_dim_ + d] * inverse * unit[d] + center[d];
    }
  }

 private:
  using Probability = std::conditional_t<sizeof(Value) == 1, uint8_t, int16_t>;
  static constexpr int64_t kPieces = kIntegerKeys / kPieceKeys;

  void start(const FullRows& x, const float* query_factor, int64_t h, int64_t first_row, int64_t rows) {
    std::memset(output_, 0, static_cast<size_t>(rows * head_dim_) * sizeof(float));
    std::fill_n(maximum_, rows, kMinusInfinity);
    std::fill_n(sum_, rows, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      x.rotate(kernels_, x.query(first_row + r, h), first_row + r, query_);
      query_units_[r] = kernels_.quantize_i16(query_, query_factor, head_dim_, largest_key(head_dim_),
                                              queries_ + r * room_);
    }
  }

  void softmax(int64_t begin, int64_t end, int64_t n) {
    const auto steps = [&](auto kernel) {
      kernel(scores_, kIntegerKeys, end - begin, n, maximum_ + begin, sum_ + begin, factors_ + begin,
             probabilities_ + begin * kIntegerKeys, kIntegerKeys, scales_ + begin, kTileRows);
    };
    if constexpr (sizeof(Value) == 1)
      steps(kernels_.softmax_steps_u8);
    else
      steps(kernels_.softmax_steps_i16);
    for (int64_t r = begin; r < end; ++r)
      if (factors_[r] != 1.0f) kernels_.scale_row(output_ + r * head_dim_, factors_[r], head_dim_);
  }

  void multiply_values(int64_t rows, int64_t n, const Value* values, int64_t value_panel) {
    const auto add = [&](auto kernel, int64_t key, int64_t keys) {
      kernel(probabilities_ + key, kIntegerKeys, values + key * kPanelRows, value_panel, rows, head_dim_,
             keys, scales_ + key / kPieceKeys * kTileRows, {output_, head_dim_, nullptr, Store::Accumulate});
    };
    const int64_t depth = padded(n, Heads::kValueRun);
    for (int64_t key = 0; key < depth; key += kPieceKeys) {
      const int64_t keys = std::min(kPieceKeys, depth - key);
      if constexpr (sizeof(Value) == 1)
        add(kernels_.gemm_u8_i8, key, keys);
      else
        add(kernels_.gemm_i16, key, keys);
    }
  }

  const KernelTable& kernels_;
  int64_t head_dim_, room_;
  float* scores_;               // [near rows][keys], to the base 2
  float* output_;               // [rows][head_dim], in units of the values'
  float* maximum_;              // [rows]
  float* sum_;                  // [rows]
  float* factors_;              // [rows], by which a step of the softmax shrinks what was before it
  float* query_units_;          // [rows]
  float* scales_;               // [pieces][rows], of the probabilities
  float* query_;                // [head_dim]
  int16_t* queries_;            // [rows][room]
  Probability* probabilities_;  // [rows][keys]
};

}  // namespace qwen2vl::cpu
