#pragma once

// The plain twins: precision "exact". float32 throughout, one obvious loop each; weights stay as the
// file has them and are taken apart for each product. They are what the fast kernels are compared with on a
// device, and what verifies a file there; nothing here is tuned.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/gguf_rows.cuh"
#include "cuda/kernels/norms.cuh"

namespace qwen2vl::cuda {

struct Dequantize {
  const uint8_t* rows;  ///< [features] of row_bytes
  int64_t row_bytes;
  int32_t features, columns;
  float* out;  ///< [features][columns]
};

/// A thread a piece of a row.
template <DType T>
CHIP_KERNEL void CHIP_BOUNDS(128, 4) dequantize_rows(Dequantize p) {
  const int64_t pieces = (p.columns + RowPiece<T>::kColumns - 1) / RowPiece<T>::kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, row = i / pieces;
  if (row >= p.features) return;
  float* out = p.out + row * p.columns;
  values_of<T>(p.rows + row * p.row_bytes, p.columns, i % pieces,
               [&](int64_t k, float value) { out[k] = value; });
}

struct PlainLinear {
  const float* weight;  ///< [features][columns]
  const float* bias;    ///< or null
  const float* x;       ///< [rows][x_stride]
  int64_t x_stride;
  int32_t rows, columns, features;
  float* out;  ///< [rows][stride]
  int64_t stride;
  int32_t accumulate;  ///< out += instead of =
};

inline constexpr int kPlainTile = 16;

/// Grid: (tiles of 16 features, tiles of 16 rows), 256 threads. Both operands pass through shared memory.
CHIP_KERNEL void CHIP_BOUNDS(256, 2) plain_linear(PlainLinear p) {
  constexpr int kTile = kPlainTile, kPitch = kTile + 1;
  const Shared<float> x = shared_cast<float>(shared_memory()), w = x + kTile * kPitch;
  const int thread = static_cast<int>(threadIdx.x), i = thread / kTile, j = thread % kTile;
  const int row = static_cast<int>(blockIdx.y) * kTile, feature = static_cast<int>(blockIdx.x) * kTile;
  float sum = 0;
  for (int k = 0; k < p.columns; k += kTile) {
    const bool inside = k + j < p.columns;
    x[i * kPitch + j] = inside && row + i < p.rows ? p.x[(row + i) * p.x_stride + k + j] : 0.0f;
    w[i * kPitch + j] = inside && feature + i < p.features
                            ? p.weight[static_cast<int64_t>(feature + i) * p.columns + k + j]
                            : 0.0f;
    __syncthreads();
    for (int c = 0; c < kTile; ++c) sum += x[i * kPitch + c] * w[j * kPitch + c];
    __syncthreads();
  }
  if (row + i >= p.rows || feature + j >= p.features) return;
  if (p.bias != nullptr) sum += p.bias[feature + j];
  float* to = p.out + (row + i) * p.stride + feature + j;
  *to = p.accumulate ? *to + sum : sum;
}

enum class Activation : int32_t { SwiGlu, QuickGelu, Gelu };

struct Activate {
  Activation what;
  float* x;         ///< [count], changed in place
  const float* up;  ///< SwiGlu: [count]
  int64_t count;
};

CHIP_KERNEL void CHIP_BOUNDS(256, 4) plain_activation(Activate p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  const float x = p.x[i];
  switch (p.what) {
    case Activation::SwiGlu:
      p.x[i] = x / (1.0f + expf(-x)) * p.up[i];
      return;
    case Activation::QuickGelu:
      p.x[i] = x / (1.0f + expf(-1.702f * x));
      return;
    case Activation::Gelu:
      p.x[i] = 0.5f * x * (1.0f + erff(x * 0.707106781186547524f));
      return;
  }
}

struct PlainRotate {
  float* x;  ///< [rows][stride]: heads of head_dim, of which the first `rotated` turn
  int64_t stride;
  const float* rotation;  ///< [rows][cos: half | sin: half]
  int32_t half, rotated;
  // Where the rows are a batch's, its keys and values go to the pages: they follow the `queries` heads.
  const RowInfo* rows;  ///< or null
  PageLayout pages;
  int32_t layer, queries;
};

/// A block a row.
CHIP_KERNEL void CHIP_BOUNDS(256, 4) plain_rotate(PlainRotate p) {
  const int64_t row = blockIdx.x;
  float* x = p.x + row * p.stride;
  const float* turn = p.rotation + row * 2 * p.half;
  for (int i = static_cast<int>(threadIdx.x); i < p.rotated * p.half; i += static_cast<int>(blockDim.x)) {
    float* v = x + i / p.half * 2 * p.half + i % p.half;
    const float2 turned = rotate(make_float2(v[0], v[p.half]), turn[i % p.half], turn[p.half + i % p.half]);
    v[0] = turned.x;
    v[p.half] = turned.y;
  }
  if (p.rows == nullptr) return;
  __syncthreads();
  const RowInfo& info = p.rows[row];
  float* page = reinterpret_cast<float*>(info.pages[info.cell / kPageCells]);
  const int head_dim = 2 * p.half, values = p.pages.kv_heads * head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * values; i += static_cast<int>(blockDim.x)) {
    const int head = i % values / head_dim;
    page[p.pages.panel(p.layer, i / values, head) + info.cell % kPageCells * p.pages.head_dim +
         i % head_dim] = x[p.queries * head_dim + i];
  }
}

struct PlainAttention {
  const float* queries;  ///< [rows][query_stride]: heads of head_dim
  int64_t query_stride;
  float scale;
  int32_t head_dim, group;
  // A batch's rows over their pages, or
  const RowInfo* rows;
  PageLayout pages;
  int32_t layer;
  // all of `cells` rows of keys and values [cells][kv_stride].
  const float* keys;
  const float* values;
  int64_t kv_stride;
  int32_t cells;
  float* out;  ///< [rows][out_stride]
  int64_t out_stride;
};

/// Grid: (rows, heads), a warp each; lanes share the dimensions, 256 at most.
CHIP_KERNEL void CHIP_BOUNDS(32, 8) plain_attention(PlainAttention p) {
  constexpr int kMost = 8;  // dimensions a lane: head_dim up to 256
  const int lane = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.y),
            kv_head = head / p.group;
  const int64_t row = blockIdx.x;
  const float* q = p.queries + row * p.query_stride + static_cast<int64_t>(head) * p.head_dim;
  const RowInfo* info = p.rows == nullptr ? nullptr : p.rows + row;
  const int cells = info == nullptr ? p.cells : info->cell + 1;
  float out[kMost] = {};
  float maximum = -1e30f, sum = 0;
  for (int cell = 0; cell < cells; ++cell) {
    const float *k, *v;
    if (info != nullptr) {
      const float* page = reinterpret_cast<const float*>(info->pages[cell / kPageCells]);
      k = page + p.pages.panel(p.layer, 0, kv_head) + cell % kPageCells * p.pages.head_dim;
      v = page + p.pages.panel(p.layer, 1, kv_head) + cell % kPageCells * p.pages.head_dim;
    } else {
      k = p.keys + cell * p.kv_stride + static_cast<int64_t>(kv_head) * p.head_dim;
      v = p.values + cell * p.kv_stride + static_cast<int64_t>(kv_head) * p.head_dim;
    }
    float dot = 0;
    for (int d = lane; d < p.head_dim; d += 32) dot += q[d] * k[d];
    const float score = warp_sum(dot) * p.scale;
    const float before = maximum;
    maximum = fmaxf(maximum, score);
    const float factor = expf(before - maximum), weight = expf(score - maximum);
    sum = sum * factor + weight;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (lane + 32 * i < p.head_dim) out[i] = out[i] * factor + weight * v[lane + 32 * i];
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i)
    if (lane + 32 * i < p.head_dim)
      p.out[row * p.out_stride + static_cast<int64_t>(head) * p.head_dim + lane + 32 * i] = out[i] / sum;
}

}  // namespace qwen2vl::cuda
