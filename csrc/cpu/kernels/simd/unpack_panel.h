#pragma once

// Panels of every type to float32 [cols][16], written once; needs the including instruction set's simd.h.

#include "cpu/kernels/simd/tile.h"

namespace qwen2vl::cpu {
namespace {

inline const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

/// Four consecutive k of kLanes rows, an unsigned byte each: (byte - offset) * scale to out[k][16].
inline void unpack_group(IntVec bytes, int offset, Vec scale, float* out) {
  QWEN2VL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const IntVec q = sub(bit_and(shift_right(bytes, 8 * i), set1_int(0xff)), set1_int(offset));
    store(out + i * kPanelRows, mul(scale, to_float(q)));
  }
}

// Each of these: one block of 32 columns, kLanes rows of the panel from `lane`, to out[32][16].

inline void unpack_q8(const uint8_t* panel, const PanelParts& parts, int64_t b, int64_t lane, float* out) {
  const Vec scale = load_f16(halves(panel + parts.scales) + b * kPanelRows + lane);
  for (int g = 0; g < 8; ++g) {
    const IntVec q = load_int(panel + (b * 8 + g) * kGroupBytes + lane * 4);
    const IntVec plus_128 = bit_xor(q, set1_int(INT32_C(-0x7f7f7f80)));  // 0x80 in each byte
    unpack_group(plus_128, 128, scale, out + 4 * g * kPanelRows);
  }
}

/// Values 0..3 and 16..19 (and so on with g) of a block.
inline void low_nibbles(const uint8_t* quants, int64_t b, int g, int64_t lane, IntVec& low, IntVec& high) {
  const IntVec mask = set1_int(0x0f0f0f0f);
  const IntVec q = load_int(quants + (b * 4 + g) * kGroupBytes + lane * 4);
  low = bit_and(q, mask);
  high = bit_and(shift_right(q, 4), mask);
}

inline void unpack_q4(const uint8_t* panel, const PanelParts& parts, int64_t b, int64_t lane, float* out) {
  const Vec scale = load_f16(halves(panel + parts.scales) + b * kPanelRows + lane);
  for (int g = 0; g < 4; ++g) {
    IntVec low, high;
    low_nibbles(panel, b, g, lane, low, high);
    unpack_group(low, 8, scale, out + 4 * g * kPanelRows);
    unpack_group(high, 8, scale, out + (16 + 4 * g) * kPanelRows);
  }
}

inline void unpack_q6(const uint8_t* panel, const PanelParts& parts, int64_t b, int64_t lane, float* out) {
  const Vec super = load_f16(halves(panel + parts.super) + b / 8 * kPanelRows + lane);
  const uint8_t* subs = panel + parts.scales + b * 2 * kPanelRows + lane;
  const Vec scale_low = mul(super, to_float(load_int8(subs)));
  const Vec scale_high = mul(super, to_float(load_int8(subs + kPanelRows)));
  const IntVec mask = set1_int(0x30303030);
  QWEN2VL_UNROLL
  for (int g = 0; g < 4; ++g) {
    IntVec low, high;
    low_nibbles(panel, b, g, lane, low, high);
    // Groups g and g + 4 = 2 f + h: bits 2 f and 2 f + 1 of vector h, wanted at bits 4 and 5.
    const IntVec bits = load_int(panel + parts.high + (b * 2 + g % 2) * kGroupBytes + lane * 4);
    const int f = g / 2;
    low = bit_or(low, bit_and(shift_left(bits, 4 - 2 * f), mask));
    high = bit_or(high, bit_and(f == 0 ? bits : shift_right(bits, 2), mask));
    unpack_group(low, 32, scale_low, out + 4 * g * kPanelRows);
    unpack_group(high, 32, scale_high, out + (16 + 4 * g) * kPanelRows);
  }
}

using UnpackBlock = void (*)(const uint8_t*, const PanelParts&, int64_t, int64_t, float*);

inline void unpack_panel(const PanelMatrix& w, int64_t index, float* out) {
  const uint8_t* panel = w.data + index * w.panel_bytes;
  const PanelParts parts = panel_parts(w.type, w.cols);
  const int64_t n = w.cols * kPanelRows;
  UnpackBlock unpack = nullptr;
  switch (w.type) {
    case DType::F32:
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(reinterpret_cast<const float*>(panel) + i));
      return;
    case DType::F16:
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_f16(halves(panel) + i));
      return;
    case DType::BF16:
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_bf16(halves(panel) + i));
      return;
    case DType::Q8_0:
      unpack = unpack_q8;
      break;
    case DType::Q4_0:
      unpack = unpack_q4;
      break;
    case DType::Q6_K:
      unpack = unpack_q6;
      break;
  }
  for (int64_t b = 0; b < w.cols / kBlock32; ++b) {
    for (int64_t lane = 0; lane < kPanelRows; lane += kLanes) {
      unpack(panel, parts, b, lane, out + b * kBlock32 * kPanelRows + lane);
    }
  }
}

}  // namespace
}  // namespace qwen2vl::cpu
