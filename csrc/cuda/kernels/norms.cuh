#pragma once

// RMSNorm and LayerNorm: a warp a row. Memory-bound: a row is read once into registers where it fits, else twice.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

CHIP_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(kAllLanes, v, mask);
  return v;
}
CHIP_DEVICE float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, mask));
  return v;
}

/// 1 / sqrt(mean(x^2) + eps) in every lane: the same bits wherever a row is normalized.
CHIP_DEVICE float warp_rms(const float* x, int width, float eps, int lane) {
  constexpr int kBatch = 12;  // loads on their way at once: all of the 2B's 1,536
  float sum = 0;
  const int vectors = width % 4 == 0 ? width / 4 : 0;
  for (int first = lane; first < vectors; first += 32 * kBatch) {
    float4 v[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      v[i] = first + 32 * i < vectors ? reinterpret_cast<const float4*>(x)[first + 32 * i]
                                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      sum += v[i].x * v[i].x + v[i].y * v[i].y + (v[i].z * v[i].z + v[i].w * v[i].w);
  }
  for (int i = 4 * vectors + lane; i < width; i += 32) sum += x[i] * x[i];
  return rsqrtf(warp_sum(sum) / static_cast<float>(width) + eps);
}

struct Norm {
  const float* x;       ///< [rows][width]
  const float* weight;  ///< [width]
  const float* bias;    ///< [width], or null: RMSNorm
  float eps;
  int32_t width, rows;
  uint16_t* half_out;  ///< bf16 [rows][stride], or
  float* out;          ///< float32 [rows][stride]
  int64_t stride;
};

/// A block of `blockDim.x / 32` rows.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) norm_rows(Norm p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + static_cast<int64_t>(threadIdx.x) / 32;
  wait_for_previous_launch();
  let_next_launch_start();
  if (row >= p.rows) return;
  const float* x = p.x + row * p.width;
  float mean = 0, r;
  if (p.bias == nullptr) {
    r = warp_rms(x, p.width, p.eps, lane);
  } else {
    float sum = 0;
    for (int i = lane; i < p.width; i += 32) sum += x[i];
    mean = warp_sum(sum) / static_cast<float>(p.width);
    float squares = 0;
    for (int i = lane; i < p.width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
    r = rsqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);
  }
  const auto value = [&](int i) {
    return p.bias == nullptr ? x[i] * r * p.weight[i] : (x[i] - mean) * r * p.weight[i] + p.bias[i];
  };
  if (p.out != nullptr)
    for (int i = lane; i < p.width; i += 32) p.out[row * p.stride + i] = value(i);
  else  // the stride is even, and what is beyond the width is zero
    for (int i = 2 * lane; i < p.width; i += 64)
      *reinterpret_cast<uint32_t*>(p.half_out + row * p.stride + i) =
          pack_bf16(value(i), i + 1 < p.width ? value(i + 1) : 0.0f);
}

}  // namespace qwen2vl::cuda
