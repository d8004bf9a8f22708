#pragma once

// Panels of every type to float32 [cols][16], written once; needs the including instruction set's simd.h.

#include "cpu/kernels/simd/vector_decoder.h"

namespace qwen2vl::cpu {
namespace {

/// Four consecutive columns of kLanes rows as float32.
template <DType T>
struct UnpackedGroup {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  IntVec bytes;
  Vec scale, minimum;

  UnpackedGroup(const VectorDecoder<T>& decoder, int64_t b, int g, int v)
      : bytes(decoder.quants(b, g, v)), scale(decoder.scale(b, 4 * g / kFormat.part, v)) {
    if constexpr (kFormat.is_signed()) bytes = bit_xor(bytes, set1_bytes(0x80));
    if constexpr (kFormat.has_minimum) minimum = decoder.minimum(b, v);
  }

  /// Of the i-th column.
  Vec values(int i) const {
    constexpr int kOffset = kFormat.is_signed() ? 128 : kFormat.offset;
    const IntVec q = sub(bit_and(shift_right(bytes, 8 * i), set1_int(0xff)), set1_int(kOffset));
    const Vec x = mul(scale, to_float(q));
    if constexpr (kFormat.has_minimum) return sub(x, minimum);
    return x;
  }
};

template <DType T>
inline void unpack_blocks(const PanelMatrix& w, int64_t index, float* out) {
  const VectorDecoder<T> decoder(w, index);
  for (int64_t b = 0; b < w.cols / kBlock32; ++b) {
    for (int v = 0; v < kVectorsPerPanel; ++v) {
      QWEN2VL_UNROLL
      for (int g = 0; g < 8; ++g) {
        const UnpackedGroup<T> group(decoder, b, g, v);
        QWEN2VL_UNROLL
        for (int i = 0; i < 4; ++i)
          store(out + (b * kBlock32 + 4 * g + i) * kPanelRows + v * kLanes, group.values(i));
      }
    }
  }
}

inline void unpack_panel(const PanelMatrix& w, int64_t index, float* out) {
  const uint8_t* panel = w.data + index * w.panel_bytes;
  const int64_t n = w.cols * kPanelRows;
  visit_dtype(w.type, [&]<DType T>() {
    if constexpr (T == DType::F32)
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(reinterpret_cast<const float*>(panel) + i));
    else if constexpr (T == DType::F16)
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_f16(as_16_bits(panel) + i));
    else if constexpr (T == DType::BF16)
      for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_bf16(as_16_bits(panel) + i));
    else
      unpack_blocks<T>(w, index, out);
  });
}

inline void unpack_columns(const PanelMatrix& w, int64_t panel, const int32_t* columns, int64_t n,
                           float* out) {
  visit_quantized(w.type, [&]<DType T>() {
    const VectorDecoder<T> decoder(w, panel);
    for (int64_t c = 0; c < n; ++c) {
      const int64_t b = columns[c] / kBlock32;
      const int i = static_cast<int>(columns[c] % kBlock32);
      for (int v = 0; v < kVectorsPerPanel; ++v)
        store(out + c * kPanelRows + v * kLanes, UnpackedGroup<T>(decoder, b, i / 4, v).values(i % 4));
    }
  });
}

}  // namespace
}  // namespace qwen2vl::cpu
