#pragma once

// The most that a chip can do, for floors: matrix products from registers, multiply-adds.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

inline constexpr int kPeakChains = 8;  // independent ones: their latency is hidden

/// Each warp: rounds * kPeakChains products of 16 x 8 x 16.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) peak_mma(int rounds, float* never) {
  float c[kPeakChains][4] = {};
  const uint32_t lane = static_cast<uint32_t>(threadIdx.x) % 32;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = 0x3f803f80u + lane + static_cast<uint32_t>(i);
  for (int r = 0; r < rounds; ++r)
#pragma unroll
    for (int i = 0; i < kPeakChains; ++i) mma_bf16(c[i], a, a[0] ^ 1u, a[1] ^ 2u);
  float sum = 0;
  for (int i = 0; i < kPeakChains; ++i) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
  if (sum == 12345.0f) *never = sum;
}

/// Each thread: rounds * kPeakChains multiply-adds.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) peak_fma(int rounds, float* never) {
  float c[kPeakChains];
  const float a = 1.0f + 1e-7f * static_cast<float>(threadIdx.x), b = 1e-7f;
#pragma unroll
  for (int i = 0; i < kPeakChains; ++i) c[i] = static_cast<float>(i);
  for (int r = 0; r < rounds; ++r)
#pragma unroll
    for (int i = 0; i < kPeakChains; ++i) c[i] = fmaf(c[i], a, b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPeakChains; ++i) sum += c[i];
  if (sum == 12345.0f) *never = sum;
}

}  // namespace qwen2vl::cuda
