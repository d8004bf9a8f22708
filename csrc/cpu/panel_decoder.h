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

/// The plain decode step of every layout: a quantized panel value by value (simd/vector_decoder.h has its
/// vectors).
template <DType T>
class PanelDecoder {
 public:
  static constexpr QuantFormat kFormat = traits_of(T).format;

  PanelDecoder(const PanelMatrix& w, int64_t panel)
      : panel_(w.panel(panel)), parts_(panel_parts(w.type, w.cols)), layout_(w.layout) {}

  /// The integer of column k, row r: QuantFormat::value.
  int quant(int64_t k, int64_t r) const {
    int q = bits<kFormat.low_bits>(0, k, r);
    if constexpr (kFormat.high_bits > 0) q |= bits<kFormat.high_bits>(parts_.high, k, r) << kFormat.low_bits;
    return kFormat.value(q);
  }

  float scale(int64_t k, int64_t r) const { return part_value<0>(parts_.scales, parts_.block_scales, k, r); }
  /// 0 where the format has none.
  float minimum(int64_t k, int64_t r) const {
    if constexpr (!kFormat.has_minimum) return 0;
    return part_value<4>(parts_.minima, parts_.block_minima, k, r);
  }

  /// Where scales have fewer bits than 16: scale = block_scale * part_scale, and so the minimum.
  int part_scale(int64_t k, int64_t r) const { return part_integer<0>(parts_.scales, k, r); }
  int part_minimum(int64_t k, int64_t r) const { return part_integer<4>(parts_.minima, k, r); }
  float block_scale(int64_t k, int64_t r) const { return block_value(parts_.block_scales, k, r); }
  float block_minimum(int64_t k, int64_t r) const { return block_value(parts_.block_minima, k, r); }

  float value(int64_t k, int64_t r) const {
    const float x = scale(k, r) * static_cast<float>(quant(k, r));
    if constexpr (kFormat.has_minimum) return x - minimum(k, r);
    return x;
  }

 private:
  template <int kBits>
  int bits(int64_t part, int64_t k, int64_t r) const {
    const int64_t in_block = k % kBlock32;
    if constexpr (kBits == 3) {
      const auto byte = [&](int64_t word) {
        return panel_[part + layout_.offset(3, k / kBlock32, r, 4 * word + k % 4)];
      };
      const int64_t word = in_block / 4 % 4, half = in_block / 16;
      return word < 3 ? byte(word) >> 3 * half & 7 : byte(half) >> 6 | (byte(2) >> (6 + half) & 1) << 2;
    }
    const int byte = panel_[part + layout_.offset(kBits, k / kBlock32, r, in_block % (4 * kBits))];
    return byte >> (in_block / (4 * kBits) * kBits) & ((1 << kBits) - 1);
  }

  /// kShift: where 4 bits begin.
  template <int kShift>
  int part_integer(int64_t values, int64_t k, int64_t r) const {
    const uint8_t byte = panel_[values + k / kFormat.part * kPanelRows + r];
    return kFormat.scale_bits == 4 ? byte >> kShift & 15 : static_cast<int8_t>(byte);
  }

  float block_value(int64_t values, int64_t k, int64_t r) const {
    return load_f16(panel_ + values + (k / kBlock256 * kPanelRows + r) * 2);
  }

  template <int kShift>
  float part_value(int64_t values, int64_t block_values, int64_t k, int64_t r) const {
    if constexpr (kFormat.scale_bits == 16)
      return load_f16(panel_ + values + (k / kFormat.part * kPanelRows + r) * 2);
    return block_value(block_values, k, r) * static_cast<float>(part_integer<kShift>(values, k, r));
  }

  const uint8_t* panel_;
  PanelParts parts_;
  PanelLayout layout_;
};

}  // namespace qwen2vl::cpu
