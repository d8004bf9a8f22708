#pragma once

// Attention of many queries without a matrix of scores in memory (Dao, arXiv 2307.08691): the vision tower's,
// where every patch sees all of its temporal step, and a prompt's, causal, over the pages of the cache.
//
// A block takes 64 or 128 queries of one head, a warp 16 or 32 of them; keys and values come in steps of 64
// (a page) into shared memory, the next step's while one is multiplied. Scores, their running maximum and
// sum, and the output stay in registers: what mma leaves of scores is, as f16, mma's left operand for the
// values. Scores are in powers of two (the queries carry log2(e)). head_dim 80 is 5 steps of 16: nothing is
// padded but rows in shared memory, by 8 values, which puts the rows of a matrix into different banks.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"

namespace qwen2vl::cuda {

struct FlashAttention {
  const uint16_t* queries;  ///< f16, times scale and log2(e)
  int64_t query_row_stride, query_head_stride;
  int32_t rows;   ///< queries of a step of the grid's z
  int32_t cells;  ///< keys of it
  /// Keys and values in rows of head_dim, 64 after 64: one after another, or in pages.
  const uint16_t* keys;
  const uint16_t* values;
  int64_t key_head_stride;
  uint8_t* const* page_table;  ///< or null
  PageLayout pages;
  int32_t layer;
  int32_t group;       ///< query heads of a key-value head
  int32_t first_cell;  ///< query i sees cells up to first_cell + i; -1: all of them
  uint16_t* out;       ///< bf16 [rows][stride]: head * true_head_dim + d
  int64_t stride;
  int32_t true_head_dim;
  /// For wgmma_attention.cuh alone: values [heads][head_dim][transposed_stride] in place of `values`, or
  /// null.
  const uint16_t* transposed_values;
  int64_t transposed_stride;
};

inline constexpr int kFlashKeys = 64, kFlashThreads = 128;

CHIP_HOST_DEVICE constexpr int64_t flash_shared_bytes(int head_dim, int row_tiles) {
  return 2 * static_cast<int64_t>(head_dim + 8) * (64 * row_tiles + 4 * kFlashKeys);
}

/// Grid: (tiles of 64 kRowTiles queries, heads, temporal steps).
template <int kHeadDim, int kRowTiles>
CHIP_KERNEL void CHIP_BOUNDS(kFlashThreads, 2) flash_attention(FlashAttention p) {
  constexpr int kPitch = kHeadDim + 8, kSteps = kHeadDim / 16, kQueries = 64 * kRowTiles,
                kVectors = kHeadDim / 8;
  static_assert(kHeadDim % 16 == 0);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, g = lane / 4,
            t = lane % 4;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / p.group;
  // Causal tiles late in the prompt take longest: they start first.
  const int tile = p.first_cell < 0 ? static_cast<int>(blockIdx.x)
                                    : static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const int first_query = tile * kQueries;
  const int64_t z = blockIdx.z;
  const Shared<uint16_t> q_rows = shared_cast<uint16_t>(shared_memory());
  const Shared<uint16_t> stages = q_rows + kQueries * kPitch;  // [2][keys, values][64][kPitch]
  wait_for_previous_launch();
  let_next_launch_start();

  const int seen = p.first_cell < 0 ? p.cells : min(p.cells, p.first_cell + first_query + kQueries);
  const int steps = (seen + kFlashKeys - 1) / kFlashKeys;
  // Addresses of pages come a step before they are needed: nothing waits for them.
  const uint8_t* next_page = p.page_table != nullptr ? p.page_table[0] : nullptr;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const uint16_t *k, *v;
      if (p.page_table != nullptr) {
        const uint16_t* page = reinterpret_cast<const uint16_t*>(next_page);
        if (step + 1 < steps) next_page = p.page_table[step + 1];
        k = page + p.pages.panel(p.layer, 0, kv_head);
        v = page + p.pages.panel(p.layer, 1, kv_head);
      } else {
        const int64_t at = kv_head * p.key_head_stride + (z * p.cells + step * kFlashKeys) * kHeadDim;
        k = p.keys + at;
        v = p.values + at;
      }
      const Shared<uint16_t> stage = stages + step % 2 * 2 * kFlashKeys * kPitch;
      const int here = min(kFlashKeys, p.cells - step * kFlashKeys);
      for (int i = thread; i < 2 * kFlashKeys * kVectors; i += kFlashThreads) {
        const int part = i / (kFlashKeys * kVectors), row = i / kVectors % kFlashKeys,
                  column = i % kVectors * 8;
        copy_async(shared_cast<uint4>(stage + (part * kFlashKeys + row) * kPitch + column),
                   (part == 0 ? k : v) + (row < here ? row * kHeadDim + column : 0), row < here);
      }
    }
    copy_commit();
  };

  for (int i = thread; i < kQueries * kVectors; i += kFlashThreads) {
    const int row = i / kVectors, column = i % kVectors * 8, query = first_query + row;
    const bool valid = query < p.rows;
    copy_async(
        shared_cast<uint4>(q_rows + row * kPitch + column),
        p.queries +
            (valid ? (z * p.rows + query) * p.query_row_stride + head * p.query_head_stride + column : 0),
        valid);
  }
  fetch(0);

  constexpr bool kKeepQueries = kRowTiles == 1;  // in registers; two tiles of them would spill
  uint32_t q[kRowTiles][kKeepQueries ? kSteps : 1][4];
  const auto load_queries = [&](int m, int k, uint32_t (&to)[4]) {
    load_matrices(to, q_rows + ((warp * kRowTiles + m) * 16 + lane % 16) * kPitch + k * 16 + lane / 16 * 8);
  };
  float out[kRowTiles][2 * kSteps][4] = {};
  float maxima[kRowTiles][2], sums[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      maxima[m][half] = -1e30f;
      sums[m][half] = 0;
    }

  for (int step = 0; step < steps; ++step) {
    fetch(step + 1);
    copy_wait<1>();
    __syncthreads();
    if (kKeepQueries && step == 0)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load_queries(m, k, q[m][kKeepQueries ? k : 0]);
    const Shared<uint16_t> k_rows = stages + step % 2 * 2 * kFlashKeys * kPitch;
    const Shared<uint16_t> v_rows = k_rows + kFlashKeys * kPitch;

    float scores[kRowTiles][8][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int kept = kKeepQueries ? k : 0;
      if (!kKeepQueries)
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) load_queries(m, k, q[m][0]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrices(b, k_rows + (n * 16 + lane / 16 * 8 + lane % 8) * kPitch + k * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_f16(scores[m][2 * n], q[m][kept], b[0], b[1]);
          mma_f16(scores[m][2 * n + 1], q[m][kept], b[2], b[3]);
        }
      }
    }

    const int first_key = step * kFlashKeys;
    const bool whole = first_key + kFlashKeys <= p.cells &&
                       (p.first_cell < 0 || first_key + kFlashKeys - 1 <= p.first_cell + first_query);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (!whole)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = first_key + n * 8 + 2 * t + i % 2;
            const int query = first_query + (warp * kRowTiles + m) * 16 + i / 2 * 8 + g;
            if (key >= p.cells || (p.first_cell >= 0 && key > p.first_cell + query)) scores[m][n][i] = -1e30f;
          }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float maximum = maxima[m][half];
#pragma unroll
        for (int n = 0; n < 8; ++n)
          maximum = fmaxf(maximum, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
        maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
        const float factor = fast_exp2(maxima[m][half] - maximum);
        maxima[m][half] = maximum;
        sums[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < 2 * kSteps; ++n) {
          out[m][n][2 * half] *= factor;
          out[m][n][2 * half + 1] *= factor;
        }
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][n][i] = fast_exp2(scores[m][n][i] - maximum);
            sums[m][half] += scores[m][n][i];
          }
      }
    }

#pragma unroll
    for (int k = 0; k < kFlashKeys / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          a[m][i] =
              pack_small_f16(scores[m][2 * k + i / 2][i % 2 * 2], scores[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, v_rows + (k * 16 + lane % 16) * kPitch + n * 16 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma_f16(out[m][2 * n], a[m], b[0], b[1]);
          mma_f16(out[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sums[m][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int query = first_query + (warp * kRowTiles + m) * 16 + half * 8 + g;
      if (query >= p.rows) continue;
      const float inverse = 1.0f / sum;
      uint16_t* to = p.out + (z * p.rows + query) * p.stride + static_cast<int64_t>(head) * p.true_head_dim;
#pragma unroll
      for (int n = 0; n < 2 * kSteps; ++n) {
        const int d = n * 8 + 2 * t;
        const uint32_t word = pack_bf16(out[m][n][2 * half] * inverse, out[m][n][2 * half + 1] * inverse);
        if (d + 1 < p.true_head_dim)  // an even number: the word is aligned
          *reinterpret_cast<uint32_t*>(to + d) = word;
      }
    }
}

}  // namespace qwen2vl::cuda
