#pragma once

// RMSNorm and LayerNorm: a warp a row. Memory-bound: a row is read once into registers where it fits, else
// twice.

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

/// A block of `blockDim.x / 32` rows. Rows of up to 128 kNormVectors values stay in registers.
template <int kNormVectors>
CHIP_KERNEL void CHIP_BOUNDS(256, kNormVectors > 12 ? 1 : 2) norm_rows(Norm p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + static_cast<int64_t>(threadIdx.x) / 32;
  let_next_launch_start();
  wait_for_previous_launch();
  if (row >= p.rows) return;
  const float* x = p.x + row * p.width;
  const auto stored = [&](int i, float v) {
    if (p.out != nullptr)
      p.out[row * p.stride + i] = v;
    else
      p.half_out[row * p.stride + i] = static_cast<uint16_t>(pack_bf16(v, 0.0f));
  };
  if constexpr (kNormVectors > 0) {
    const int vectors = p.width / 4;
    float4 v[kNormVectors];
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i)
      v[i] = lane + 32 * i < vectors ? reinterpret_cast<const float4*>(x)[lane + 32 * i]
                                     : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float mean = 0, squares = 0;
    if (p.bias != nullptr) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kNormVectors; ++i) sum += v[i].x + v[i].y + (v[i].z + v[i].w);
      mean = warp_sum(sum) / static_cast<float>(p.width);
#pragma unroll
      for (int i = 0; i < kNormVectors; ++i)
        if (lane + 32 * i < vectors)
          v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
    }
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i)  // as warp_rms does
      squares += v[i].x * v[i].x + v[i].y * v[i].y + (v[i].z * v[i].z + v[i].w * v[i].w);
    const float r = rsqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);
#pragma unroll
    for (int i = 0; i < kNormVectors; ++i) {
      const int at = lane + 32 * i;
      if (at >= vectors) continue;
      const float4 w = reinterpret_cast<const float4*>(p.weight)[at];
      float4 y = make_float4(v[i].x * r * w.x, v[i].y * r * w.y, v[i].z * r * w.z, v[i].w * r * w.w);
      if (p.bias != nullptr) {
        const float4 b = reinterpret_cast<const float4*>(p.bias)[at];
        y = make_float4(y.x + b.x, y.y + b.y, y.z + b.z, y.w + b.w);
      }
      if (p.out != nullptr)
        reinterpret_cast<float4*>(p.out + row * p.stride)[at] = y;
      else
        reinterpret_cast<uint2*>(p.half_out + row * p.stride)[at] =
            make_uint2(pack_bf16(y.x, y.y), pack_bf16(y.z, y.w));
    }
  } else {
    float mean = 0, r;
    if (p.bias == nullptr) {
      r = warp_rms(x, p.width, p.eps, lane);
    } else {
      float sum = 0, squares = 0;
      for (int i = lane; i < p.width; i += 32) sum += x[i];
      mean = warp_sum(sum) / static_cast<float>(p.width);
      for (int i = lane; i < p.width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
      r = rsqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.eps);
    }
    for (int i = lane; i < p.width; i += 32)
      stored(i, (x[i] - mean) * r * p.weight[i] + (p.bias == nullptr ? 0.0f : p.bias[i]));
  }
}

}  // namespace qwen2vl::cuda
