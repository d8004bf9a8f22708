#pragma once

// The vision tower's attention on Hopper, head_dim 80 without padding. A block takes 64 queries of a head for
// each of its groups of four warps; one thread keeps 128 keys and values after 128 coming by bulk copies.
// Scores are five products of 16 dimensions: four out of rows of 64 (swizzled over 128 bytes), one out of
// rows of 16 (over 32), which is how 80 is cut; values come transposed, [80][keys], in two boxes of 64 keys,
// so that they are rows of what is summed over, and N is 80. Scores and probabilities stay in registers, as
// in flash_attention.cuh, its plain twin. The groups are not in step: while one is at its exponentials,
// others keep the matrix units at work.

#include "cuda/kernels/flash_attention.cuh"
#include "cuda/kernels/hopper.cuh"

namespace qwen2vl::cuda {

inline constexpr int kHopperHeadDim = 80, kHopperKeys = 128, kHopperGroups = 3, kHopperStages = 3;
inline constexpr int kHopperQueries = 64 * kHopperGroups, kHopperThreads = 128 * kHopperGroups;
inline constexpr int kHopperWide = kHopperKeys * 128, kHopperNarrow = kHopperKeys * 32;  // bytes of keys
inline constexpr int kHopperValues = kHopperHeadDim * 128;                               // of 64 of them
inline constexpr int kHopperStage = kHopperWide + kHopperNarrow + 2 * kHopperValues;
inline constexpr int64_t kHopperSharedBytes =
    1024 + kHopperQueries * 160 + static_cast<int64_t>(kHopperStages) * kHopperStage;

struct HopperAttention {
  int32_t rows;      ///< of a temporal step
  int32_t all_rows;  ///< of all of them
  int32_t heads;
  uint16_t* out;  ///< bf16 [rows][stride]: head * 80 + d
  int64_t stride;
};

/// Grid: (tiles of queries, heads, temporal steps). wide, narrow: queries, then keys,
/// [2][heads][all_rows][80] in boxes of 64 and of 16 columns (of kHopperQueries' thirds and of kHopperKeys
/// rows: 64); values: [heads][80][all_rows].
__global__ void __launch_bounds__(kHopperThreads, 1)
    wgmma_attention_kernel(const __grid_constant__ CUtensorMap wide,
                           const __grid_constant__ CUtensorMap narrow,
                           const __grid_constant__ CUtensorMap values,
                           const __grid_constant__ HopperAttention p) {
#ifdef QWEN2VL_HAS_WGMMA
  uint8_t* stages = shared_memory();
  uint8_t* queries =
      stages + kHopperStages * kHopperStage;  // [group][64 x 128 bytes], then [group][64 x 32 bytes]
  uint8_t* narrow_queries = queries + kHopperQueries * 128;
  uint64_t* full = reinterpret_cast<uint64_t*>(narrow_queries + kHopperQueries * 32);
  uint64_t* empty = full + kHopperStages;
  uint64_t* queries_full = empty + kHopperStages;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y), step_row = static_cast<int>(blockIdx.z) * p.rows;
  const int first_query = static_cast<int>(blockIdx.x) * kHopperQueries;
  const int tiles = (p.rows + kHopperKeys - 1) / kHopperKeys;
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&wide, &narrow, &values}) prefetch_map(map);
    for (int s = 0; s < kHopperStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 4 * kHopperGroups);
    }
    barrier_init(queries_full, 1);
    fence_barrier_init();
  }
  __syncthreads();

  const auto fetch = [&](int tile) {
    const int s = tile % kHopperStages;
    uint8_t* stage = stages + s * kHopperStage;
    barrier_expect(full + s, kHopperStage);
    for (int i = 0; i < 2; ++i) {
      const int key = step_row + tile * kHopperKeys + i * 64, row = (p.heads + head) * p.all_rows + key;
      copy_box(stage + i * 64 * 128, &wide, 0, row, full + s);
      copy_box(stage + kHopperWide + i * 64 * 32, &narrow, 64, row, full + s);
      copy_box(stage + kHopperWide + kHopperNarrow + i * kHopperValues, &values, key, head * kHopperHeadDim,
               full + s);
    }
  };
  if (threadIdx.x == 0) {
    barrier_expect(queries_full, kHopperQueries * 160);
    for (int i = 0; i < kHopperGroups; ++i) {
      const int row = head * p.all_rows + step_row + first_query + i * 64;
      copy_box(queries + i * 64 * 128, &wide, 0, row, queries_full);
      copy_box(narrow_queries + i * 64 * 32, &narrow, 64, row, queries_full);
    }
    fetch(0);
    if (tiles > 1) fetch(1);
  }

  const int group = warp / 4, g = lane / 4, t = lane % 4;
  const uint64_t q_wide = operand(queries + group * 64 * 128, 128);
  const uint64_t q_narrow = operand(narrow_queries + group * 64 * 32, 32);
  float out[40] = {};
  float maxima[2] = {-1e30f, -1e30f}, sums[2] = {0, 0};
  barrier_wait(queries_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int s = tile % kHopperStages;
    const uint8_t* stage = stages + s * kHopperStage;
    float scores[64];
    // A stage is filled anew when two tiles have gone by: groups may be so far apart.
    if (threadIdx.x == 0 && tile > 0 && tile + 1 < tiles) {
      if (tile >= 2) barrier_wait(empty + (tile + 1) % kHopperStages, (tile - 2) / kHopperStages % 2);
      fetch(tile + 1);
    }
    barrier_wait(full + s, tile / kHopperStages % 2);
    {
      const uint64_t k_wide = operand(stage, 128), k_narrow = operand(stage + kHopperWide, 32);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma(WgmmaF16(), scores, q_wide + k * kOperandStep, k_wide + k * kOperandStep, k > 0 ? 1 : 0);
      wgmma(WgmmaF16(), scores, q_narrow, k_narrow, 1);
      wgmma_commit();
      wgmma_wait<0>();
    }
    if ((tile + 1) * kHopperKeys > p.rows) {
      const int left = p.rows - tile * kHopperKeys;
#pragma unroll
      for (int i = 0; i < 64; ++i)
        if (i / 4 * 8 + 2 * t + i % 2 >= left) scores[i] = -1e30f;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = maxima[half];
#pragma unroll
      for (int n = 0; n < 16; ++n)
        maximum = fmaxf(maximum, fmaxf(scores[4 * n + 2 * half], scores[4 * n + 2 * half + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, 2));
      const float factor = fast_exp2(maxima[half] - maximum);
      maxima[half] = maximum;
      float sum = sums[half] * factor;
#pragma unroll
      for (int n = 0; n < 10; ++n) {
        out[4 * n + 2 * half] *= factor;
        out[4 * n + 2 * half + 1] *= factor;
      }
#pragma unroll
      for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int i = 4 * n + 2 * half; i < 4 * n + 2 * half + 2; ++i) {
          scores[i] = fast_exp2(scores[i] - maximum);
          sum += scores[i];
        }
      sums[half] = sum;
    }
    uint32_t a[8][4];
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = pack_small_f16(scores[8 * k + 2 * i], scores[8 * k + 2 * i + 1]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k)
      wgmma(WgmmaF16(), out, a[k],
            operand(stage + kHopperWide + kHopperNarrow + k / 4 * kHopperValues, 128) + k % 4 * kOperandStep);
    wgmma_commit();
    wgmma_wait<0>();
    if (lane == 0) barrier_arrive(empty + s);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = sums[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int query = first_query + group * 64 + warp % 4 * 16 + half * 8 + g;
    if (query >= p.rows) continue;
    const float inverse = 1.0f / sum;
    uint16_t* to = p.out + static_cast<int64_t>(step_row + query) * p.stride + head * kHopperHeadDim;
#pragma unroll
    for (int n = 0; n < 10; ++n)
      *reinterpret_cast<uint32_t*>(to + n * 8 + 2 * t) =
          pack_bf16(out[4 * n + 2 * half] * inverse, out[4 * n + 2 * half + 1] * inverse);
  }
#endif
}

}  // namespace qwen2vl::cuda
