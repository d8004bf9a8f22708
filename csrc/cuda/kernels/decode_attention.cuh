#pragma once

// Attention of single rows (decoding) over their sequences' pages, a block a query head.
//
// Latency-bound at first: few cells, many launches; then by how fast keys and values are read, in whole
// 16-byte (keys) and 4-byte neighbouring (values) pieces. The query heads of a key-value head find them in
// the second-level cache. A sequence's pages are cut into chunks by its own length alone, so that a row's
// result does not depend on its neighbours. A block takes the chunk of one row and head: scores with four
// threads a key; every warp takes the running softmax of them for itself, which spares two barriers a page;
// values with a thread for two dimensions. The next page's keys and values are on their way meanwhile. The
// last block of a row and head to arrive joins the chunks, in order.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/norms.cuh"

namespace qwen2vl::cuda {

inline constexpr int kMaxChunks = 32, kDecodeThreads = 256;

CHIP_HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

/// Pages of a chunk of a sequence of so many pages. Of fewer than two, chunks are not worth joining.
CHIP_HOST_DEVICE constexpr int pages_per_chunk(int pages) {
  const int pages_at_least = 2, share = ceil_div(pages, kMaxChunks);
  return share > pages_at_least ? share : pages_at_least;
}

struct DecodeAttention {
  const uint16_t* queries;  ///< f16 [rows][heads][head_dim], times scale and log2(e)
  const RowInfo* rows;
  PageLayout pages;
  int32_t layer;
  int32_t group;  ///< query heads of a key-value head
  int32_t heads;
  int32_t true_head_dim;
  float* parts;       ///< [rows][heads][kMaxChunks][2 + head_dim]: maximum, sum, values
  uint32_t* arrived;  ///< [rows][heads], zero before and after
  uint16_t* out;      ///< bf16 [rows][stride]
  int64_t stride;
  /// Each row is the one new cell of its sequence: what is before it was there before the launch before this
  /// one, so a block may read its first page, but for that cell, without waiting.
  int32_t single;
};

/// Grid: (chunks of the longest sequence, query heads, rows).
template <int kHeadDim>
CHIP_KERNEL void CHIP_BOUNDS(kDecodeThreads, 2) decode_attention(DecodeAttention p) {
  constexpr int kQuarter = kHeadDim / 4, kVectors = kQuarter / 8;  // of 8 f16
  constexpr int kPairs = kHeadDim / 2, kKeyGroups = kDecodeThreads / kPairs,
                kGroupKeys = ceil_div(kPageCells, kKeyGroups);
  static_assert(kHeadDim % 32 == 0 && kHeadDim <= kDecodeThreads);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int chunk = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y),
            kv_head = head / p.group;
  const int64_t row = blockIdx.z;
  const int key = thread / 4, quarter = thread % 4, pair = thread % kPairs, key_group = thread / kPairs;
  const Shared<float> scores = shared_cast<float>(shared_memory());               // [2][kPageCells]
  const Shared<float> weights = scores + (2 + warp) * kPageCells;                 // [warp][kPageCells]
  const Shared<float> meeting = scores + (2 + kDecodeThreads / 32) * kPageCells;  // [key group][head_dim]
  const Shared<uint32_t> last = shared_cast<uint32_t>(meeting + kKeyGroups * kHeadDim);
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
  uint4 q[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    q[i] =
        reinterpret_cast<const uint4*>(p.queries + (row * p.heads + head) * kHeadDim + quarter * kQuarter)[i];

  float maximum = -1e30f, sum = 0;
  float2 values = make_float2(0.0f, 0.0f);
  const auto dot = [](float total, uint32_t a, uint32_t b) {
    const float2 x = unpack_f16(a), y = unpack_f16(b);
    return total + x.x * y.x + x.y * y.y;
  };
  for (int page = first_page; page <= last_page; ++page) {
    const int here = min(kPageCells, cells - page * kPageCells);
    const int next_cells = page < last_page ? min(kPageCells, cells - (page + 1) * kPageCells) : 0;
    const uint16_t* next_page = page < last_page ? page_at(page + 1) : nullptr;
    const Shared<float> page_scores = scores + page % 2 * kPageCells;
    float score = 0;
    if (key < here)
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        score = dot(score, k_vectors[i].x, q[i].x);
        score = dot(score, k_vectors[i].y, q[i].y);
        score = dot(score, k_vectors[i].z, q[i].z);
        score = dot(score, k_vectors[i].w, q[i].w);
      }
    score += __shfl_xor_sync(kAllLanes, score, 1);
    score += __shfl_xor_sync(kAllLanes, score, 2);
    if (quarter == 0) page_scores[key] = key < here ? score : -1e30f;
    load_keys(next_page, 0, next_cells);
    __syncthreads();
    const float a = page_scores[lane], b = page_scores[32 + lane];
    const float before = maximum;
    maximum = fmaxf(maximum, warp_max(fmaxf(a, b)));
    const float pa = lane < here ? fast_exp2(a - maximum) : 0.0f;
    const float pb = 32 + lane < here ? fast_exp2(b - maximum) : 0.0f;
    const float factor = fast_exp2(before - maximum);
    sum = sum * factor + warp_sum(pa + pb);
    values = make_float2(values.x * factor, values.y * factor);
    weights[lane] = pa;
    weights[32 + lane] = pb;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kGroupKeys; ++j) {
      const int cell = key_group * kGroupKeys + j;
      if (key_group >= kKeyGroups || cell >= here) continue;
      const float2 two = unpack_f16(v_words[j]);
      const float weight = weights[cell];
      values.x += weight * two.x;
      values.y += weight * two.y;
    }
    load_values(next_page, 0, next_cells);
    __syncwarp();
  }

  // The key groups' values meet, in their order.
  if (key_group < kKeyGroups) shared_cast<float2>(meeting)[key_group * kPairs + pair] = values;
  __syncthreads();
  const auto write = [&](float value) {
    if (thread < p.true_head_dim)
      p.out[row * p.stride + static_cast<int64_t>(head) * p.true_head_dim + thread] =
          static_cast<uint16_t>(pack_bf16(value, 0.0f));
  };
  constexpr int kPart = 2 + kHeadDim;
  float* parts = p.parts + (row * p.heads + head) * kMaxChunks * kPart;
  if (thread < kHeadDim) {
    float value = 0;
#pragma unroll
    for (int k = 0; k < kKeyGroups; ++k) value += meeting[k * kHeadDim + thread];
    if (chunks == 1)
      write(value / sum);
    else
      parts[chunk * kPart + 2 + thread] = value;
  }
  if (chunks == 1) return;
  if (thread == 0) {
    parts[chunk * kPart] = maximum;
    parts[chunk * kPart + 1] = sum;
  }
  __threadfence();
  __syncthreads();
  uint32_t* arrived = p.arrived + row * p.heads + head;
  if (thread == 0) last[0] = atomicAdd(arrived, 1u) + 1 == static_cast<uint32_t>(chunks) ? 1u : 0u;
  __syncthreads();
  if (last[0] == 0) return;
  __threadfence();
  const volatile float* all = parts;
  const float chunk_maximum = lane < chunks ? all[lane * kPart] : -1e30f;  // by every warp for itself
  const float chunk_sum = lane < chunks ? all[lane * kPart + 1] : 0.0f;
  const float weight = fast_exp2(chunk_maximum - warp_max(chunk_maximum));
  const float share = weight / warp_sum(chunk_sum * weight);
  float value = 0;
#pragma unroll 4
  for (int c = 0; c < chunks; ++c)
    value += __shfl_sync(kAllLanes, share, c) * (thread < kHeadDim ? all[c * kPart + 2 + thread] : 0.0f);
  write(value);
  if (thread == 0) *arrived = 0;
}

CHIP_HOST_DEVICE constexpr int64_t decode_attention_shared_bytes(int head_dim) {
  const int key_groups = kDecodeThreads / (head_dim / 2);
  return int64_t{4} * ((2 + kDecodeThreads / 32) * kPageCells + key_groups * head_dim) + 16;
}

}  // namespace qwen2vl::cuda
