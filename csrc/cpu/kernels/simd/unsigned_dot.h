#pragma once

// matmul_q8's products of unsigned by signed bytes in 32 bits; needs the including instruction set's simd.h
// with dot_step.

#include <bit>

#include "cpu/kernels/simd/vector_decoder.h"

namespace qwen2vl::cpu {
namespace {

/// Weights are made unsigned by an offset, and the sums start from the correction, -offset * sum of the
/// activations.
template <DType T>
struct Dot {
  static constexpr QuantFormat kFormat = traits_of(T).format;
  static constexpr int kOffset = kFormat.is_signed() ? 128 : kFormat.offset;
  static constexpr int kRows = 1, kColumns = 4;
  /// Of two parts of 16, the second's weights stay where they are in their bytes.
  static constexpr int kSecond = kFormat.low_bits == 3 ? 3 : 4;
  using Weights = IntVec;
  using Activations = IntVec;
  using Acc = IntVec;

  static Weights weights(const auto& decoder, int64_t b, int g, int v) {
    if constexpr (kFormat.scales_integers()) return decoder.quants(b, g, v, g / 4 * kSecond);
    const IntVec q = decoder.quants(b, g, v);
    return kFormat.is_signed() ? bit_xor(q, set1_bytes(0x80)) : q;
  }
  static void load(IntVec& x, const int8_t* part, int64_t, int g) { x = broadcast_group(part + 4 * g); }
  static Acc start(const int32_t* correction, int s) {
    if constexpr (kOffset == 0) return set1_int(0);
    constexpr int kShift = 7 - std::countr_zero(unsigned{kOffset});
    return shift_right_signed(set1_int(*correction),
                              kFormat.scales_integers() ? kShift - s * kSecond : kShift);
  }
  static void step(Acc& acc, Weights w, IntVec x, int) { dot_step(acc, w, x); }
  static IntVec finish(Acc acc, int, const int32_t*) { return acc; }
  static IntVec weighted(Acc first, Acc second, int, const int32_t*, IntVec scales) {
    return weighted_sum<kSecond>(first, second, scales);
  }
};

}  // namespace
}  // namespace qwen2vl::cpu
