#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "cpu/panel_matrix.h"
#include "quant/formats.h"

namespace qwen2vl::cpu {

inline float load_f16(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof half);
  return f16_to_f32(half);
}

/// The plain decode step: a quantized panel value by value (simd/vector_decoder.h has its vectors).
template <DType T>
class PanelDecoder {
 public:
  static constexpr QuantFormat kFormat = traits_of(T).format;

  PanelDecoder(const PanelMatrix& w, int64_t panel)
      : panel_(w.panel(panel)), parts_(panel_parts(w.type, w.cols)) {}

  /// The integer of column k, row r, its offset taken off.
  int quant(int64_t k, int64_t r) const {
    const int64_t b = k / kBlock32, g = k % kBlock32 / 4, at = r * 4 + k % 4;
    if constexpr (kFormat.low_bits == 8) {
      return static_cast<int8_t>(panel_[(b * 8 + g) * kGroupBytes + at]) - kFormat.offset;
    } else {
      int q = panel_[(b * 4 + g % 4) * kGroupBytes + at] >> (g < 4 ? 0 : 4) & 15;
      if constexpr (constexpr int n = kFormat.high_bits; n > 0) {
        const int byte = panel_[parts_.high + (b * n + g % n) * kGroupBytes + at];
        q |= (byte >> (g / n * n) & ((1 << n) - 1)) << 4;
      }
      return q - kFormat.offset;
    }
  }

  float scale(int64_t k, int64_t r) const { return part_value(parts_.scales, parts_.block_scales, k, r); }
  /// 0 where the format has none.
  float minimum(int64_t k, int64_t r) const {
    if constexpr (!kFormat.has_minimum) return 0;
    return part_value(parts_.minima, parts_.block_minima, k, r);
  }

  float value(int64_t k, int64_t r) const {
    const float x = scale(k, r) * static_cast<float>(quant(k, r));
    if constexpr (kFormat.has_minimum) return x - minimum(k, r);
    return x;
  }

 private:
  float part_value(int64_t values, int64_t block_values, int64_t k, int64_t r) const {
    const int64_t at = k / kFormat.part * kPanelRows + r;
    if constexpr (kFormat.scale_bits == 16) return load_f16(panel_ + values + at * 2);
    const float block = load_f16(panel_ + block_values + (k / kBlock256 * kPanelRows + r) * 2);
    return block * static_cast<float>(static_cast<int8_t>(panel_[values + at]));
  }

  const uint8_t* panel_;
  PanelParts parts_;
};

}  // namespace qwen2vl::cpu
