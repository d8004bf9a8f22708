#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/kernels/kernel_table.h"
#include "quant/formats.h"
#include "quant/quantize.h"

namespace qwen2vl::cpu {

using Floats = std::vector<float>;

/// Standard normal values; every 50th column a hundred times larger, as real activations have them.
inline Floats random_floats(int64_t rows, int64_t cols, uint32_t seed, bool outliers = false) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Floats values(rows * cols);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = normal(engine) * (outliers && i % cols % 50 == 7 ? 100.0f : 1.0f);
  }
  return values;
}

/// An output area with poison around and inside, to see what was written.
class Poisoned {
 public:
  static constexpr float kPoison = -12345.678f;
  explicit Poisoned(int64_t n) : values_(n + 2 * kMargin, kPoison) {}
  float* data() { return values_.data() + kMargin; }
  float operator[](int64_t i) const { return values_[i + kMargin]; }

  /// Whether every element is still poison but those [rows][cols] at `stride` from `begin`.
  bool untouched_outside(int64_t begin, int64_t rows, int64_t cols, int64_t stride) const {
    for (int64_t i = 0; i < static_cast<int64_t>(values_.size()); ++i) {
      const int64_t at = i - kMargin - begin;
      const bool inside = at >= 0 && at / stride < rows && at % stride < cols;
      if (!inside && values_[i] != kPoison) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kMargin = 64;
  Floats values_;
};

/// Empty where |actual - expected| <= tolerance(i) for all i (equal values and NaN for NaN pass); otherwise
/// the worst element with both values.
template <typename Actual, typename Expected, typename Tolerance>
std::string worst_mismatch(int64_t n, const Actual& actual, const Expected& expected, Tolerance tolerance) {
  int64_t worst = -1;
  double worst_excess = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double a = actual[i], e = expected[i];
    if (a == e || (std::isnan(a) && std::isnan(e))) continue;
    double excess = std::fabs(a - e) / (tolerance(i) + 1e-300);
    if (!(excess >= 0)) excess = std::numeric_limits<double>::infinity();
    if (excess > 1.0 && excess > worst_excess) worst = i, worst_excess = excess;
  }
  if (worst < 0) return "";
  std::ostringstream text;
  text.precision(9);
  text << "element " << worst << " of " << n << ": " << actual[worst] << ", expected " << expected[worst]
       << ", off by " << worst_excess << " tolerances";
  return text.str();
}

template <typename Actual, typename Expected>
std::string worst_mismatch(int64_t n, const Actual& actual, const Expected& expected) {
  return worst_mismatch(n, actual, expected, [](int64_t) { return 0.0; });
}

/// Every type of the list, and the quantized ones.
inline std::vector<DType> dtypes() {
  std::vector<DType> types;
  for (const DTypeTraits& traits : kDTypes) types.push_back(traits.type);
  return types;
}
inline std::vector<DType> quantized_dtypes() {
  std::vector<DType> types = dtypes();
  std::erase_if(types, [](DType type) { return !is_quantized(type); });
  return types;
}

/// A random matrix in GGUF's row-major blocks, packed in panels.
struct TestMatrix {
  std::vector<uint8_t> blocks;
  AlignedBuffer storage;
  PanelMatrix panels;

  TestMatrix(DType type, int64_t rows, int64_t cols, uint32_t seed, const PanelLayout& layout = {})
      : blocks(rows * row_bytes(type, cols)) {
    if (dtype_traits(type).is_written)
      quantize_rows(type, random_floats(rows, cols, seed).data(), rows, cols, blocks.data());
    else
      fill_blocks(dtype_traits(type), seed);
    pack(type, rows, cols, layout);
  }

  /// The same, in a kernel table's layout.
  TestMatrix(const TestMatrix& other, const PanelLayout& layout) : blocks(other.blocks) {
    pack(other.panels.type, other.panels.rows, other.panels.cols, layout);
  }

  /// Random integers with d (and m) such that values lie on both sides of 0.
  void fill_blocks(const DTypeTraits& traits, uint32_t seed) {
    std::mt19937 engine(seed);
    for (uint8_t& byte : blocks) byte = static_cast<uint8_t>(engine());
    const bool is_subtracted = traits.format.scale_bits < 16;  // else it is added
    for (size_t at = d_offset(traits.type); at < blocks.size(); at += traits.block_bytes) {
      const auto d = static_cast<uint16_t>(0x2a00 + engine() % 512);  // 0.05 .. 0.08
      const auto m = static_cast<uint16_t>((is_subtracted ? 0x3800 : 0xb800) + engine() % 512);
      std::memcpy(&blocks[at], &d, sizeof d);
      if (traits.format.has_minimum) std::memcpy(&blocks[at + 2], &m, sizeof m);
    }
  }

  void pack(DType type, int64_t rows, int64_t cols, const PanelLayout& layout = {}) {
    panels = {type, rows, cols, panel_parts(type, cols).bytes, nullptr, layout};
    storage = AlignedBuffer(panels.panel_count() * panels.panel_bytes);
    for (int64_t p = 0; p < panels.panel_count(); ++p) {
      pack_panel(panels, blocks.data(), rows, p, storage.data() + p * panels.panel_bytes);
    }
    panels.data = storage.data();
  }

  /// [rows][cols]
  Floats dequantized() const {
    Floats values(panels.rows * panels.cols);
    const int64_t bytes = row_bytes(panels.type, panels.cols);
    for (int64_t r = 0; r < panels.rows; ++r) {
      dequantize_row(panels.type, blocks.data() + r * bytes, panels.cols, values.data() + r * panels.cols);
    }
    return values;
  }
};

/// Memory for QuantizedRows.
struct QuantizedBuffer {
  AlignedBuffer values;
  Floats scales;
  std::vector<int32_t> corrections32, corrections16;
  QuantizedRows rows;

  QuantizedBuffer(int64_t n_rows, int64_t cols, int planes = 1)
      : values(planes * n_rows * cols),
        scales(n_rows * cols / 32),
        corrections32(planes * n_rows * cols / 32),
        corrections16(planes * n_rows * cols / 16),
        rows{n_rows,
             cols,
             planes,
             values.as<int8_t>(),
             scales.data(),
             corrections32.data(),
             corrections16.data()} {
    std::memset(values.data(), 0x5a, planes * n_rows * cols);
  }
  /// [rows][cols] in double: what the integers stand for.
  double value(int64_t m, int64_t k) const {
    const int8_t* at = rows.values + m * rows.cols + k;
    const double rest = rows.planes == 2 ? at[rows.rows * rows.cols] / 256.0 : 0.0;
    return static_cast<double>(scales[m * (rows.cols / 32) + k / 32]) * (*at + rest);
  }
};

/// The error as a fraction of the energy.
inline double nmse(const std::vector<double>& expected, const Floats& actual) {
  double error = 0, energy = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(actual[i] - expected[i], 2);
    energy += expected[i] * expected[i];
  }
  return error / energy;
}

}  // namespace qwen2vl::cpu
