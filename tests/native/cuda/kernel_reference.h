#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "base/half.h"
#include "cuda/linear.h"
#include "quant/quantize.h"

// What the tests of the CUDA kernels compare with: plain references in double, and outputs that show what was
// written.

namespace qwen2vl::cuda {

using Values = std::vector<float>;
using Doubles = std::vector<double>;
using Halves = std::vector<uint16_t>;

// Norm-wise errors |out - reference| / |reference| that are due to rounding alone.
inline constexpr double kExact = 1e-5;    ///< sums in float32
inline constexpr double kStored = 3e-3;   ///< results rounded to bf16: 2^-9 of each at most
inline constexpr double kRounded = 6e-3;  ///< operands rounded to bf16, too: less than 2^-8 and that

inline Values random_values(int64_t n, uint32_t seed, float scale = 1.0f) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Values values(n);
  for (float& v : values) v = scale * normal(engine);
  return values;
}

inline float bf16_of(float v) { return bf16_to_f32(f32_to_bf16(v)); }

/// [rows][cols] as bf16 [rows][stride], zeros beyond.
inline Halves bf16_rows(const Values& x, int64_t cols, int64_t stride) {
  Halves out(static_cast<int64_t>(x.size()) / cols * stride, 0);
  for (size_t i = 0; i < x.size(); ++i) out[i / cols * stride + i % cols] = f32_to_bf16(x[i]);
  return out;
}

inline Halves f16_values(const Values& x) {
  Halves out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = f32_to_f16(x[i]);
  return out;
}

/// |values - reference| / |reference|; NaN where something was not written.
inline double distance(const Doubles& values, const Doubles& reference) {
  if (values.size() != reference.size()) return std::nan("");
  double difference = 0, all = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    difference += (values[i] - reference[i]) * (values[i] - reference[i]);
    all += reference[i] * reference[i];
  }
  return std::sqrt(difference / all);
}

/// Rows of float32 or bf16, all NaN before, with more of them before and behind.
template <typename T>
class Output {
 public:
  Output(int64_t rows, int64_t stride)
      : rows_(rows), stride_(stride), values_(2 * kMargin + (rows + 2) * stride, poison()) {}
  T* data() { return values_.data() + kMargin; }
  /// The first `columns` of every row.
  Doubles values(int64_t columns) const {
    Doubles out;
    for (int64_t i = 0; i < rows_ * stride_; ++i)
      if (i % stride_ < columns) out.push_back(number(values_[kMargin + i]));
    return out;
  }
  /// Whether nothing but those was written.
  bool untouched_beyond(int64_t columns) const {
    for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); ++i) {
      const int64_t at = i - kMargin;
      const bool inside = at >= 0 && at < rows_ * stride_ && at % stride_ < columns;
      if (!inside && !is_poison(values_[i])) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kMargin = 64;
  static T poison() {
    if constexpr (sizeof(T) == 4)
      return std::bit_cast<float>(0x7fc0beefu);
    else
      return 0x7fee;
  }
  static bool is_poison(T v) {
    if constexpr (sizeof(T) == 4)
      return std::bit_cast<uint32_t>(v) == 0x7fc0beefu;
    else
      return v == poison();
  }
  static double number(T v) {
    if constexpr (sizeof(T) == 4)
      return v;
    else
      return bf16_to_f32(v);
  }
  int64_t rows_, stride_;
  std::vector<T> values_;
};

/// A random linear layer as a file has it. Its address is in what is packed of it: it stays where it is.
struct Layer {
  Layer(DType stored_type, int64_t n_rows, int64_t n_cols, uint32_t seed, bool with_bias = true)
      : type(stored_type), rows(n_rows), cols(n_cols), blocks(rows * row_bytes(type, cols)) {
    quantize_rows(type, random_values(rows * cols, seed).data(), rows, cols, blocks.data());
    weight.resize(rows * cols);
    for (int64_t r = 0; r < rows; ++r)
      dequantize_row(type, blocks.data() + r * row_bytes(type, cols), cols, weight.data() + r * cols);
    if (with_bias) bias = random_values(rows, seed + 1);
    linear = {{static_cast<uint32_t>(type), rows, cols, blocks.data()},
              {bias.data(), static_cast<int64_t>(bias.size())}};
  }
  Layer(const Layer&) = delete;
  Layer& operator=(const Layer&) = delete;

  /// The weights as bf16.
  Values rounded() const {
    Values out = weight;
    for (float& v : out) v = bf16_of(v);
    return out;
  }
  /// The weights as few_rows multiplies with them: integers and scales are exact.
  Values multiplied() const { return is_quantized(type) ? weight : rounded(); }
  /// x W^T + bias of x [rows][cols], with `w` for the weights.
  Doubles product(const Doubles& x, const Values& w) const {
    const int64_t n = static_cast<int64_t>(x.size()) / cols;
    Doubles out(n * rows);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t r = 0; r < rows; ++r) {
        double sum = bias.empty() ? 0.0 : bias[r];
        for (int64_t k = 0; k < cols; ++k) sum += x[i * cols + k] * static_cast<double>(w[r * cols + k]);
        out[i * rows + r] = sum;
      }
    return out;
  }

  DType type;
  int64_t rows, cols;
  std::vector<uint8_t> blocks;
  Values weight, bias;
  qwen2vl_linear linear{};
};

/// RMSNorm, or LayerNorm where there is a bias.
inline Doubles normalized(const Values& x, const Values& weight, const Values& bias, double eps) {
  const int64_t width = static_cast<int64_t>(weight.size());
  Doubles out(x.begin(), x.end());
  for (int64_t row = 0; row < static_cast<int64_t>(x.size()) / width; ++row) {
    double* v = out.data() + row * width;
    double mean = 0, squares = 0;
    if (!bias.empty())
      for (int64_t i = 0; i < width; ++i) mean += v[i] / static_cast<double>(width);
    for (int64_t i = 0; i < width; ++i) squares += (v[i] - mean) * (v[i] - mean);
    const double r = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    for (int64_t i = 0; i < width; ++i)
      v[i] = (v[i] - mean) * r * weight[i] + (bias.empty() ? 0.0 : static_cast<double>(bias[i]));
  }
  return out;
}

inline double silu_of(double x) { return x / (1 + std::exp(-x)); }
inline double finished(Finish finish, double x) {
  if (finish == Finish::QuickGelu) return x / (1 + std::exp(-1.702 * x));
  if (finish == Finish::Gelu) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  return x;
}

/// Softmax, in powers of two, of one query over `cells` keys, times their values.
template <typename Key, typename Value>
Doubles attend(const uint16_t* query, int64_t head_dim, int64_t cells, Key key, Value value) {
  Doubles weights(cells), out(head_dim, 0.0);
  double maximum = -INFINITY, sum = 0;
  for (int64_t c = 0; c < cells; ++c) {
    for (int64_t d = 0; d < head_dim; ++d)
      weights[c] += static_cast<double>(f16_to_f32(query[d])) * f16_to_f32(key(c)[d]);
    maximum = std::max(maximum, weights[c]);
  }
  for (double& w : weights) sum += w = std::exp2(w - maximum);
  for (int64_t c = 0; c < cells; ++c)
    for (int64_t d = 0; d < head_dim; ++d) out[d] += weights[c] / sum * f16_to_f32(value(c)[d]);
  return out;
}

}  // namespace qwen2vl::cuda
