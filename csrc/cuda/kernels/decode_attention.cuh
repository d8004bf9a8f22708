#pragma once

// Attention of single rows (decoding) over their sequences' pages; query heads of a key-value head together, two by two
// where there is much to read, else one by one, on more of the chip. A head's result does not depend on that.
//
// Memory-bound: every key and value is read once, in whole 16-byte (keys) and 4-byte neighbouring (values) pieces.
// A sequence's pages are cut into chunks, as many as fill the chip and by its own length alone, so that a row's
// result does not depend on its neighbours. A block takes the chunk of one row and key-value head: scores with four
// threads a key, a running softmax page by page, values with a thread for two dimensions. The last block of a
// row and head to arrive joins the chunks, in their order.

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
  /// Each row is the one new cell of its sequence: what is before it was there before the launch before this one,
  /// so a block may read its first page, but for that cell, without waiting.
  int32_t single;
};

/// Grid: (chunks of the longest sequence, key-value heads x groups of kGroup of their query heads, rows).
template <int kHeadDim, int kGroup>
CHIP_KERNEL void CHIP_BOUNDS(kDecodeThreads, 2) decode_attention(DecodeAttention p) {
  constexpr int kQuarter = kHeadDim / 4, kVectors = kQuarter / 8;            // of 8 f16
  constexpr int kPairs = kHeadDim / 2, kKeyGroups = kDecodeThreads / kPairs, kGroupKeys = ceil_div(kPageCells, kKeyGroups);
  static_assert(kHeadDim % 32 == 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int groups = ceil_div(p.group, kGroup), kv_head = static_cast<int>(blockIdx.y) / groups;
  const int within = static_cast<int>(blockIdx.y) % groups * kGroup, here_heads = min(kGroup, p.group - within);
  const int chunk = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.z;
  const int pair = thread % kPairs, key_group = thread / kPairs;
  const Shared<float> queries = shared_cast<float>(shared_memory());        // [group][head_dim]
  const Shared<float> p_keys = queries + kGroup * kHeadDim;              // [kPageCells][group]: scores, probabilities
  const Shared<float> maxima = p_keys + kGroup * kPageCells;             // [group]
  const Shared<float> rescale = maxima + kGroup;                         // [group]
  const Shared<float> sums = rescale + kGroup;                           // [group]
  const Shared<uint32_t> last = shared_cast<uint32_t>(sums + kGroup);
  let_next_launch_start();
  if (!p.single) wait_for_previous_launch();
  const RowInfo& info = p.rows[row];
  const int cells = info.cell + 1, pages = ceil_div(cells, kPageCells), per_chunk = pages_per_chunk(pages);
  const int chunks = ceil_div(pages, per_chunk);
  if (chunk >= chunks) return;

  const int key = thread / 4, quarter = thread % 4;
  uint4 k_vectors[kVectors];
  uint32_t v_words[kGroupKeys];
  const auto load_keys = [&](const uint16_t* page) {
    const uint4* k = reinterpret_cast<const uint4*>(page + p.pages.panel(p.layer, 0, kv_head) + key * kHeadDim +
                                                    quarter * kQuarter);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) k_vectors[i] = k[i];
  };
  const auto load_value = [&](const uint16_t* page, int j) {
    const uint16_t* rows = page + p.pages.panel(p.layer, 1, kv_head);
    v_words[j] = reinterpret_cast<const uint32_t*>(rows + (key_group * kGroupKeys + j) * kHeadDim)[pair];
  };
  /// Keys and values of cells [begin, end) of a page, as far as they are this thread's.
  const auto load = [&](int page, int begin, int end) {
    const uint16_t* at = reinterpret_cast<const uint16_t*>(info.pages[page]);
    if (key >= begin && key < end) load_keys(at);
    if (key_group < kKeyGroups)
#pragma unroll
      for (int j = 0; j < kGroupKeys; ++j)
        if (key_group * kGroupKeys + j >= begin && key_group * kGroupKeys + j < end) load_value(at, j);
  };
  const int first_page = chunk * per_chunk;
  const int first_cells = min(kPageCells, cells - first_page * kPageCells);
  const int newest = cells - 1 - first_page * kPageCells;  // among those, if it is below kPageCells
  load(first_page, 0, p.single ? min(first_cells, newest) : first_cells);
  if (p.single) {
    wait_for_previous_launch();
    load(first_page, newest, first_cells);
  }

  const int first_head = kv_head * p.group + within;
  for (int i = thread; i < kGroup * kPairs; i += kDecodeThreads) {
    const float2 q = i >= here_heads * kPairs ? make_float2(0.0f, 0.0f)
                                              : unpack_f16(reinterpret_cast<const uint32_t*>(
                                                    p.queries + (row * p.heads + first_head) * kHeadDim)[i]);
    queries[2 * i] = q.x;
    queries[2 * i + 1] = q.y;
  }
  if (thread < here_heads) {
    maxima[thread] = -1e30f;
    sums[thread] = 0;
  }
  __syncthreads();

  float2 values[kGroup];
#pragma unroll
  for (int h = 0; h < kGroup; ++h) values[h] = make_float2(0.0f, 0.0f);

  for (int page = first_page; page < min(pages, first_page + per_chunk); ++page) {
    const int here = min(kPageCells, cells - page * kPageCells);
    if (page > first_page) load(page, 0, here);
    {
      float dots[kGroup] = {};
      if (key < here) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const float2 k0 = unpack_f16(k_vectors[i].x), k1 = unpack_f16(k_vectors[i].y),
                       k2 = unpack_f16(k_vectors[i].z), k3 = unpack_f16(k_vectors[i].w);
#pragma unroll
          for (int h = 0; h < kGroup; ++h) {
            const Shared<float4> q = shared_cast<float4>(queries + h * kHeadDim + quarter * kQuarter + i * 8);
            const float4 a = q[0], b = q[1];
            dots[h] += k0.x * a.x + k0.y * a.y + (k1.x * a.z + k1.y * a.w) +
                       (k2.x * b.x + k2.y * b.y + (k3.x * b.z + k3.y * b.w));
          }
        }
      }
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        if (h >= here_heads) continue;
        dots[h] += __shfl_xor_sync(kAllLanes, dots[h], 1);
        dots[h] += __shfl_xor_sync(kAllLanes, dots[h], 2);
        if (quarter == 0) p_keys[key * kGroup + h] = key < here ? dots[h] : -1e30f;
      }
    }
    __syncthreads();
    for (int h = warp; h < here_heads; h += kDecodeThreads / 32) {
      const float a = p_keys[lane * kGroup + h], b = p_keys[(32 + lane) * kGroup + h];
      const float before = maxima[h], maximum = fmaxf(before, warp_max(fmaxf(a, b)));
      const float pa = lane < here ? fast_exp2(a - maximum) : 0.0f;
      const float pb = 32 + lane < here ? fast_exp2(b - maximum) : 0.0f;
      const float sum = warp_sum(pa + pb), factor = fast_exp2(before - maximum);
      p_keys[lane * kGroup + h] = pa;
      p_keys[(32 + lane) * kGroup + h] = pb;
      __syncwarp();
      if (lane == 0) {
        maxima[h] = maximum;
        rescale[h] = factor;
        sums[h] = sums[h] * factor + sum;
      }
    }
    __syncthreads();
    if (key_group < kKeyGroups) {
#pragma unroll
      for (int h = 0; h < kGroup; ++h)
        if (h < here_heads) {
          const float factor = rescale[h];
          values[h] = make_float2(values[h].x * factor, values[h].y * factor);
        }
#pragma unroll
      for (int j = 0; j < kGroupKeys; ++j) {
        const int cell = key_group * kGroupKeys + j;
        if (cell >= here) continue;
        const float2 two = unpack_f16(v_words[j]);
#pragma unroll
        for (int h = 0; h < kGroup; ++h)
          if (h < here_heads) {
            const float weight = p_keys[cell * kGroup + h];
            values[h].x += weight * two.x;
            values[h].y += weight * two.y;
          }
      }
    }
    __syncthreads();
  }

  // The key groups' values meet, in their order.
  const Shared<float> meeting = p_keys + kGroup * kPageCells + 4 * kGroup;  // [key group][group][head_dim]
  if (key_group < kKeyGroups)
#pragma unroll
    for (int h = 0; h < kGroup; ++h)
      if (h < here_heads) {
        const Shared<float> to = meeting + (key_group * kGroup + h) * kHeadDim + 2 * pair;
        to[0] = values[h].x;
        to[1] = values[h].y;
      }
  __syncthreads();
  const auto write = [&](int i, float value) {
    const int h = i / kHeadDim, d = i % kHeadDim;
    if (d < p.true_head_dim)
      p.out[row * p.stride + static_cast<int64_t>(first_head + h) * p.true_head_dim + d] =
          static_cast<uint16_t>(pack_bf16(value, 0.0f));
  };
  constexpr int kPart = 2 + kHeadDim;
  float* parts = p.parts + (row * gridDim.y + blockIdx.y) * kMaxChunks * kGroup * kPart;
  for (int i = thread; i < here_heads * kHeadDim; i += kDecodeThreads) {
    float value = 0;
    for (int k = 0; k < kKeyGroups; ++k) value += meeting[k * kGroup * kHeadDim + i];
    const int h = i / kHeadDim, d = i % kHeadDim;
    if (chunks == 1)
      write(i, value / sums[h]);
    else
      parts[(chunk * kGroup + h) * kPart + 2 + d] = value;
  }
  if (chunks == 1) return;
  if (thread < here_heads) {
    parts[(chunk * kGroup + thread) * kPart] = maxima[thread];
    parts[(chunk * kGroup + thread) * kPart + 1] = sums[thread];
  }
  __threadfence();
  __syncthreads();
  uint32_t* arrived = p.arrived + row * gridDim.y + blockIdx.y;
  if (thread == 0) last[0] = atomicAdd(arrived, 1u) + 1 == static_cast<uint32_t>(chunks) ? 1u : 0u;
  __syncthreads();
  if (last[0] == 0) return;
  __threadfence();
  const volatile float* all = parts;
  const Shared<float> weights = p_keys;  // [group][kMaxChunks]: the probabilities are done with
  for (int h = warp; h < here_heads; h += kDecodeThreads / 32) {
    const float maximum = lane < chunks ? all[(lane * kGroup + h) * kPart] : -1e30f;
    const float sum = lane < chunks ? all[(lane * kGroup + h) * kPart + 1] : 0.0f;
    const float weight = fast_exp2(maximum - warp_max(maximum));
    const float total = warp_sum(sum * weight);
    weights[h * kMaxChunks + lane] = weight / total;
  }
  __syncthreads();
  for (int i = thread; i < here_heads * kHeadDim; i += kDecodeThreads) {
    const int h = i / kHeadDim, d = i % kHeadDim;
    float value = 0;
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) value += weights[h * kMaxChunks + c] * all[(c * kGroup + h) * kPart + 2 + d];
    write(i, value);
  }
  if (thread == 0) *arrived = 0;
}

CHIP_HOST_DEVICE constexpr int64_t decode_attention_shared_bytes(int head_dim, int group) {
  const int key_groups = kDecodeThreads / (head_dim / 2);
  return 4 * (group * head_dim + group * kPageCells + 4 * group +
              static_cast<int64_t>(key_groups) * group * head_dim);
}

}  // namespace qwen2vl::cuda
