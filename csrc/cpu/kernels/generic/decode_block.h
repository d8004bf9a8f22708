#pragma once

#include <cstdint>
#include <cstring>

#include "base/half.h"
#include "cpu/panel_matrix.h"

namespace qwen2vl::cpu::generic {

/// 32 columns of a quantized panel as integers and scales: x[k][r] = scales[k / 16][r] * values[k][r].
struct DecodedBlock {
  int16_t* values;  ///< [32][16], offsets taken off
  float* scales;    ///< [2][16]
};

inline void load_scales(const uint8_t* f16, float* scales) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    uint16_t half;
    std::memcpy(&half, f16 + 2 * r, sizeof half);
    scales[r] = f16_to_f32(half);
  }
}

inline void decode_nibbles(const uint8_t* quants, int offset, int16_t* values) {
  for (int g = 0; g < 4; ++g) {
    for (int64_t r = 0; r < kPanelRows; ++r) {
      for (int i = 0; i < 4; ++i) {
        const int byte = quants[(g * kPanelRows + r) * 4 + i];
        values[(4 * g + i) * kPanelRows + r] = static_cast<int16_t>((byte & 0xf) - offset);
        values[(16 + 4 * g + i) * kPanelRows + r] = static_cast<int16_t>((byte >> 4) - offset);
      }
    }
  }
}

inline void decode_block(const PanelMatrix& w, const PanelParts& parts, const uint8_t* panel, int64_t b,
                         const DecodedBlock& out) {
  if (w.type == DType::Q8_0) {
    const uint8_t* quants = panel + b * kBlock32 * kPanelRows;
    for (int64_t k = 0; k < kBlock32; ++k) {
      for (int64_t r = 0; r < kPanelRows; ++r) {
        out.values[k * kPanelRows + r] = static_cast<int8_t>(quants[(k / 4 * kPanelRows + r) * 4 + k % 4]);
      }
    }
  } else {
    decode_nibbles(panel + b * kBlock32 * kPanelRows / 2, w.type == DType::Q4_0 ? 8 : 32, out.values);
  }
  if (w.type != DType::Q6_K) {
    load_scales(panel + parts.scales + b * kPanelRows * 2, out.scales);
    std::memcpy(out.scales + kPanelRows, out.scales, kPanelRows * sizeof(float));
    return;
  }
  const uint8_t* high = panel + parts.high + b * 2 * kPanelRows * 4;
  float supers[kPanelRows];
  load_scales(panel + parts.super + b / 8 * kPanelRows * 2, supers);
  for (int64_t r = 0; r < kPanelRows; ++r) {
    for (int k = 0; k < kBlock32; ++k) {
      const int g = k / 4, bits = high[(g % 2 * kPanelRows + r) * 4 + k % 4] >> (2 * (g / 2)) & 3;
      out.values[k * kPanelRows + r] = static_cast<int16_t>(out.values[k * kPanelRows + r] + (bits << 4));
    }
    for (int h = 0; h < 2; ++h) {
      const auto sub = static_cast<int8_t>(panel[parts.scales + (b * 2 + h) * kPanelRows + r]);
      out.scales[h * kPanelRows + r] = supers[r] * static_cast<float>(sub);
    }
  }
}

}  // namespace qwen2vl::cpu::generic
