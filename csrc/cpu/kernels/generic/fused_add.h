#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "cpu/panel_matrix.h"

namespace qwen2vl::cpu::generic {
namespace {

/// sums[r] = fma(a[r], b[r], sums[r]) for a panel's rows, the same bits whatever the processor has.
///
/// Where a fused multiply-add is a library call, in double: the product of two floats is exact there, so that
/// the addition is the one rounding before that to float. Rounding is monotonic and what lies halfway between
/// two floats is a double: rounding twice differs from rounding once only where the first ends on such a
/// halfway point, known by its last 29 bits. Below 2^-126 floats lie elsewhere. Then, rarely, all are called.
inline void fused_add(const float (&a)[kPanelRows], const float (&b)[kPanelRows], float (&sums)[kPanelRows]) {
#if !defined(__FP_FAST_FMAF) && !defined(__aarch64__) && !defined(_M_ARM64)
  double exact[kPanelRows];
  float rounded[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    exact[r] = static_cast<double>(a[r]) * static_cast<double>(b[r]) + static_cast<double>(sums[r]);
    rounded[r] = static_cast<float>(exact[r]);
  }
  uint32_t doubtful = 0;  // 32 bits wide: SSE2 compares no wider integers
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const auto low = static_cast<uint32_t>(std::bit_cast<uint64_t>(exact[r]));
    const auto magnitude = static_cast<int32_t>(std::bit_cast<uint32_t>(rounded[r]) & 0x7fffffffu);
    doubtful |= static_cast<uint32_t>((low & 0x1fffffffu) == 0x10000000u) |
                (static_cast<uint32_t>(magnitude != 0) & static_cast<uint32_t>(magnitude < 0x00800000));
  }
  if (doubtful == 0) {
    for (int64_t r = 0; r < kPanelRows; ++r) sums[r] = rounded[r];
    return;
  }
#endif
  for (int64_t r = 0; r < kPanelRows; ++r) sums[r] = std::fma(a[r], b[r], sums[r]);
}

}  // namespace
}  // namespace qwen2vl::cpu::generic
