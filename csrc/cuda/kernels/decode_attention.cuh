#pragma once

// Attention of single rows (decoding) over their sequences' pages; query heads of a key-value head together,
// two by two where there is much to read, else one by one, on more of the chip. A head's result does not
// depend on that.
//
// Memory-bound: every key and value is read once, in whole 16-byte (keys) and 4-byte neighbouring (values)
// pieces. A sequence's pages are cut into chunks, as many as fill the chip and by its own length alone, so
// that a row's result does not depend on its neighbours. A block takes the chunk of one row and some heads:
// scores with four threads a key; every warp takes the running softmax of them for itself, which spares two
// barriers a page; values with a thread for two dimensions. The next page's keys and values are on their way
// meanwhile. The last block of a row and its heads to arrive joins the chunks, in their order.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/norms.cuh"

namespace qwen2vl::cuda {

inline constexpr int kMaxChunks = 32, kDecodeThreads = 256;

CHIP_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Pages of a chunk of a sequence of so many pages.
CHIP_HOST_DEVICE constexpr int pages_per_chunk(int pages) { return ceil_div(pages, kMaxChunks); }

struct DecodeAttention {
  const uint16_t* queries;  ///< f16 [rows][heads][head_dim], times scale and log2(e)
  const RowInfo* rows;
  PageLayout pages;
  int32_t layer;
  int32_t group;  ///< query heads of a key-value head
  int32_t heads;
  int32_t true_head_dim;
  float* parts;       ///< [rows][gridDim.y][kMaxChunks][kGroup][2 + head_dim]: maximum, sum, values
  uint32_t* arrived;  ///< [rows][gridDim.y], zero before and after
  uint16_t* out;      ///< bf16 [rows][stride]
  int64_t stride;
  /// Each row is the one new cell of its sequence: what is before it was there before the launch before this
  /// one, so a block may read its first page, but for that cell, without waiting.
  int32_t single;
};

/// Grid: (chunks of the longest sequence, key-value heads x groups of kGroup of their query heads, rows).
template <int kHeadDim, int kGroup>
CHIP_KERNEL void CHIP_BOUNDS(kDecodeThreads, 2) decode_attention(DecodeAttention p) {
  constexpr int kQuarter = kHeadDim / 4, kVectors = kQuarter / 8;  // of 8 f16
  constexpr int kPairs = kHeadDim / 2, kKeyGroups = kDecodeThreads / kPairs,
                kGroupKeys = ceil_div(kPageCells, kKeyGroups);
  static_assert(kHeadDim % 32 == 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int groups = ceil_div(p.group, kGroup), kv_head = static_cast<int>(blockIdx.y) / groups;
  const int within = static_cast<int>(blockIdx.y) % groups * kGroup, heads = min(kGroup, p.group - within);
  const int first_head = kv_head * p.group + within, chunk = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.z;
  const int key = thread / 4, quarter = thread % 4, pair = thread % kPairs, key_group = thread / kPairs;
  const Shared<float> scores = shared_cast<float>(shared_memory());         // [2][kPageCells][group]
  const Shared<float> weights = scores + (2 + warp) * kPageCells * kGroup;  // [warp][kPageCells][group]
  const Shared<float> meeting =
      scores + (2 + kDecodeThreads / 32) * kPageCells * kGroup;  // [key group][group][head_dim]
  const Shared<uint32_t> last = shared_cast<uint32_t>(meeting + kKeyGroups * kGroup * kHeadDim);
  let_next_launch_start();
  if (!p.single) wait_for_previous_launch();
  const RowInfo& info = p.rows[row];
  const int cells = info.cell + 1, pages = ceil_div(cells, kPageCells), per_chunk = pages_per_chunk(pages);
  const int chunks = ceil_div(pages, per_chunk);
  if (chunk >= chunks) return;

  uint4 k_vectors[kVectors];
  uint32_t v_words[kGroupKeys];
  // Keys, or values, of cells [begin, end) of a page, as far as they are this thread's.
  const auto load_keys = [&](const uint16_t* page, int begin, int end) {
    if (key < begin || key >= end) return;
    const uint4* k = reinterpret_cast<const uint4*>(page + p.pages.panel(p.layer, 0, kv_head) +
                                                    key * kHeadDim + quarter * kQuarter);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) k_vectors[i] = k[i];
  };
  const auto load_values = [&](const uint16_t* page, int begin, int end) {
    const uint32_t* v = reinterpret_cast<const uint32_t*>(page + p.pages.panel(p.layer, 1, kv_head)) + pair;
#pragma unroll
    for (int j = 0; j < kGroupKeys; ++j) {
      const int cell = key_group * kGroupKeys + j;
      if (key_group < kKeyGroups && cell >= begin && cell < end) v_words[j] = v[cell * kPairs];
    }
  };
  const auto page_at = [&](int page) { return reinterpret_cast<const uint16_t*>(info.pages[page]); };
  const int first_page = chunk * per_chunk, last_page = min(pages, first_page + per_chunk) - 1;
  const int first_cells = min(kPageCells, cells - first_page * kPageCells);
  const int newest = min(first_cells, cells - 1 - first_page * kPageCells);  // what is below was there before
  {
    const uint16_t* page = page_at(first_page);
    load_keys(page, 0, p.single ? newest : first_cells);
    load_values(page, 0, p.single ? newest : first_cells);
    if (p.single) {
      wait_for_previous_launch();
      load_keys(page, newest, first_cells);
      load_values(page, newest, first_cells);
    }
  }
  uint4 q[kGroup][kVectors];
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      q[h][i] = h < heads
                    ? reinterpret_cast<const uint4*>(p.queries + (row * p.heads + first_head + h) * kHeadDim +
                                                     quarter * kQuarter)[i]
                    : make_uint4(0, 0, 0, 0);

  float maxima[kGroup], sums[kGroup];
  float2 values[kGroup];
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    maxima[h] = -1e30f;
    sums[h] = 0;
    values[h] = make_float2(0.0f, 0.0f);
  }
  const auto dot = [](float sum, uint32_t a, uint32_t b) {
    const float2 x = unpack_f16(a), y = unpack_f16(b);
    return sum + x.x * y.x + x.y * y.y;
  };

  for (int page = first_page; page <= last_page; ++page) {
    const int here = min(kPageCells, cells - page * kPageCells);
    const int next_cells = page < last_page ? min(kPageCells, cells - (page + 1) * kPageCells) : 0;
    const uint16_t* next_page = page < last_page ? page_at(page + 1) : nullptr;
    const Shared<float> page_scores = scores + page % 2 * kPageCells * kGroup;
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      float sum = 0;
      if (key < here)
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          sum = dot(sum, k_vectors[i].x, q[h][i].x);
          sum = dot(sum, k_vectors[i].y, q[h][i].y);
          sum = dot(sum, k_vectors[i].z, q[h][i].z);
          sum = dot(sum, k_vectors[i].w, q[h][i].w);
        }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (quarter == 0) page_scores[key * kGroup + h] = key < here ? sum : -1e30f;
    }
    load_keys(next_page, 0, next_cells);
    __syncthreads();
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      const float a = page_scores[lane * kGroup + h], b = page_scores[(32 + lane) * kGroup + h];
      const float maximum = fmaxf(maxima[h], warp_max(fmaxf(a, b)));
      const float pa = lane < here ? fast_exp2(a - maximum) : 0.0f;
      const float pb = 32 + lane < here ? fast_exp2(b - maximum) : 0.0f;
      const float factor = fast_exp2(maxima[h] - maximum);
      sums[h] = sums[h] * factor + warp_sum(pa + pb);
      maxima[h] = maximum;
      values[h] = make_float2(values[h].x * factor, values[h].y * factor);
      weights[lane * kGroup + h] = pa;
      weights[(32 + lane) * kGroup + h] = pb;
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kGroupKeys; ++j) {
      const int cell = key_group * kGroupKeys + j;
      if (key_group >= kKeyGroups || cell >= here) continue;
      const float2 two = unpack_f16(v_words[j]);
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        const float weight = weights[cell * kGroup + h];
        values[h].x += weight * two.x;
        values[h].y += weight * two.y;
      }
    }
    load_values(next_page, 0, next_cells);
    __syncwarp();
  }

  // The key groups' values meet, in their order.
  if (key_group < kKeyGroups)
#pragma unroll
    for (int h = 0; h < kGroup; ++h)
      shared_cast<float2>(meeting)[(key_group * kGroup + h) * kPairs + pair] = values[h];
  __syncthreads();
  const auto write = [&](int h, int d, float value) {
    if (h < heads && d < p.true_head_dim)
      p.out[row * p.stride + static_cast<int64_t>(first_head + h) * p.true_head_dim + d] =
          static_cast<uint16_t>(pack_bf16(value, 0.0f));
  };
  constexpr int kPart = 2 + kHeadDim;
  float* parts = p.parts + (row * gridDim.y + blockIdx.y) * kMaxChunks * kGroup * kPart;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    for (int d = thread; d < kHeadDim; d += kDecodeThreads) {
      float value = 0;
#pragma unroll
      for (int k = 0; k < kKeyGroups; ++k) value += meeting[(k * kGroup + h) * kHeadDim + d];
      if (chunks == 1)
        write(h, d, value / sums[h]);
      else
        parts[(chunk * kGroup + h) * kPart + 2 + d] = value;
    }
    if (thread == 0 && chunks > 1) {
      parts[(chunk * kGroup + h) * kPart] = maxima[h];
      parts[(chunk * kGroup + h) * kPart + 1] = sums[h];
    }
  }
  if (chunks == 1) return;
  __threadfence();
  __syncthreads();
  uint32_t* arrived = p.arrived + row * gridDim.y + blockIdx.y;
  if (thread == 0) last[0] = atomicAdd(arrived, 1u) + 1 == static_cast<uint32_t>(chunks) ? 1u : 0u;
  __syncthreads();
  if (last[0] == 0) return;
  __threadfence();
  const volatile float* all = parts;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {  // by every warp for itself
    const float maximum = lane < chunks ? all[(lane * kGroup + h) * kPart] : -1e30f;
    const float sum = lane < chunks ? all[(lane * kGroup + h) * kPart + 1] : 0.0f;
    const float weight = fast_exp2(maximum - warp_max(maximum));
    const float share = weight / warp_sum(sum * weight);
    for (int d = thread; d < ceil_div(kHeadDim, kDecodeThreads) * kDecodeThreads; d += kDecodeThreads) {
      float value = 0;
#pragma unroll 4
      for (int c = 0; c < chunks; ++c)
        value +=
            __shfl_sync(kAllLanes, share, c) * (d < kHeadDim ? all[(c * kGroup + h) * kPart + 2 + d] : 0.0f);
      if (d < kHeadDim) write(h, d, value);
    }
  }
  if (thread == 0) *arrived = 0;
}

CHIP_HOST_DEVICE constexpr int64_t decode_attention_shared_bytes(int head_dim, int group) {
  const int key_groups = kDecodeThreads / (head_dim / 2);
  return 4 * static_cast<int64_t>(group) * ((2 + kDecodeThreads / 32) * kPageCells + key_groups * head_dim) +
         16;
}

}  // namespace qwen2vl::cuda
