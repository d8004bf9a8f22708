#pragma once

// many_rows.cuh's product on Hopper. Arithmetic-bound: a block computes 128 rows x kFeatures features, two
// groups of four warps 64 rows each with wgmma, straight out of shared memory, which bulk copies of the next
// steps of 64 columns fill meanwhile.
//
// A tile reads some 70 operations a byte: the second-level cache gives no more than half of what wgmma could
// use. So four blocks, 2 x 2 tiles, are a cluster: each copies half of its rows and half of its features, to
// its neighbour too (bulk copies with several receivers), and a stage is filled anew when all who use it are
// done.
//
// Two arrangements. Of many tiles, two blocks share a multiprocessor, with three stages each, and one's
// beginning and end hide behind the other's products; a thread of the first warp sees to the copies, since a
// warp more would leave 96 registers a thread. Of few, a block has a multiprocessor for itself, six stages,
// and a warp for the copies. Measured on an H200, bf16 (us): down_proj of 1,024 rows 78 and 60; proj of a
// photo, 3,552 rows, 37 and 51; fc1 112 and 144. Two blocks of 128 features with a warp for the copies: proj
// 53, fc1 112, fc2 134 (94 as it is).

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/hopper.cuh"
#include "cuda/kernels/many_rows.cuh"

namespace qwen2vl::cuda {

inline constexpr int kWgmmaRows = 128, kWgmmaStep = 64, kWgmmaThreads = 256;

constexpr int64_t wgmma_rows_shared_bytes(int features, int stages) {
  return 1024 + stages * (kWgmmaRows + features) * kWgmmaStep * 2;
}
/// With a warp for the copies where there are six stages.
constexpr int wgmma_rows_threads(int stages) { return kWgmmaThreads + (stages > 3 ? 32 : 0); }

template <Finish finish, int kFeatures, int kStages>
__global__ void __launch_bounds__(wgmma_rows_threads(kStages), kStages > 3 ? 1 : 2)
    wgmma_rows_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                      const __grid_constant__ ManyRows p) {
#ifdef QWEN2VL_HAS_WGMMA
  constexpr int kXBytes = kWgmmaRows * kWgmmaStep * 2, kWBytes = kFeatures * kWgmmaStep * 2;
  uint8_t* shared = shared_memory();  // 1,024-byte aligned, as the swizzle wants it
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * (kXBytes + kWBytes));
  uint64_t* empty = full + kStages;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int first_row = static_cast<int>(blockIdx.y) * kWgmmaRows;
  const int first_feature = static_cast<int>(blockIdx.x) * kFeatures;
  const int steps = p.columns / kWgmmaStep;
  // The cluster's blocks are 2 y + x; those with this one's y share its rows, those with its x its features.
  const int x = static_cast<int>(blockIdx.x) % 2, y = static_cast<int>(blockIdx.y) % 2;
  const int self = 2 * y + x, beside = self ^ 1, below = self ^ 2;
  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&w_map);
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, 3 * 8);  // the warps of the three blocks that this one's copies reach
    }
    fence_barrier_init();
  }
  cluster_sync();

  const auto fetch = [&](int step) {
    const int s = step % kStages;
    uint8_t* stage = shared + s * (kXBytes + kWBytes);
    barrier_expect(full + s, kXBytes + kWBytes);
    copy_box_to(stage + x * (kXBytes / 2), &x_map, step * kWgmmaStep, first_row + x * (kWgmmaRows / 2),
                full + s, 1 << self | 1 << beside);
    copy_box_to(stage + kXBytes + y * (kWBytes / 2), &w_map, step * kWgmmaStep,
                first_feature + y * (kFeatures / 2), full + s, 1 << self | 1 << below);
  };
  constexpr bool kCopyingWarp = kStages > 3;
  if (kCopyingWarp && warp == kWgmmaThreads / 32) {
    if (lane == 0)
      for (int step = 0; step < steps; ++step) {
        if (step >= kStages) barrier_wait(empty + step % kStages, (step / kStages - 1) % 2);
        fetch(step);
      }
    __syncwarp();
    cluster_sync();  // no block may end while another copies to it or arrives at its barriers
    return;
  }
  if (!kCopyingWarp && threadIdx.x == 0)
    for (int step = 0; step < min(steps, kStages); ++step) fetch(step);

  // The sums begin with what the product is added to: it comes while the first copies do, and all of it at
  // once.
  float acc[kFeatures / 2];
  const int group = warp / 4, g = lane / 4, t = lane % 4;
  const bool wide = lies_well(finish, p.epilogue);
  const auto pair_of = [&](int tile) { return p.first_pair + (first_feature / 16 + tile) * 8 + 2 * t; };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + group * 64 + warp % 4 * 16 + half * 8 + g;
    const RowPlace place = row_place<finish == Finish::Residual ? finish : Finish::Store>(p.epilogue, row);
#pragma unroll
    for (int tile = 0; tile < kFeatures / 16; ++tile) {
      float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < p.rows && first_feature + tile * 16 < p.features) {
        if (wide) {
          v = start_both<finish>(p.epilogue, place, pair_of(tile));
        } else {
          const float2 a = start<finish>(p.epilogue, place, pair_of(tile));
          const float2 b = start<finish>(p.epilogue, place, pair_of(tile) + 1);
          v = make_float4(a.x, a.y, b.x, b.y);
        }
      }
      acc[8 * tile + 2 * half] = v.x;
      acc[8 * tile + 2 * half + 1] = v.y;
      acc[8 * tile + 4 + 2 * half] = v.z;
      acc[8 * tile + 4 + 2 * half + 1] = v.w;
    }
  }
  const auto multiply = [&](int step) {
    const int s = step % kStages;
    barrier_wait(full + s, step / kStages % 2);
    const uint8_t* stage = shared + s * (kXBytes + kWBytes);
    const uint64_t a = operand(stage + group * (kXBytes / 2), 128), b = operand(stage + kXBytes, 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kWgmmaStep / 16; ++k)
      wgmma(WgmmaBF16(), acc, a + k * kOperandStep, b + k * kOperandStep, 1);
    wgmma_commit();
  };
  multiply(0);
  wgmma_wait<0>();  // what others have put into the sums must not meet what is on its way
  for (int step = 1; step < steps; ++step) {
    multiply(step);
    wgmma_wait<1>();
    const int done = step - 1;
    if (lane < 3) barrier_arrive_at(empty + done % kStages, lane == 0 ? self : lane == 1 ? beside : below);
    if (!kCopyingWarp && threadIdx.x == 0 && done + kStages < steps) {
      barrier_wait(empty + done % kStages, done / kStages % 2);
      fetch(done + kStages);
    }
  }
  wgmma_wait<0>();
  cluster_sync();

  constexpr int kBatch = kFeatures / 32;  // tiles whose rotations are read together
  const HeadPlace first_head = head_place(p.epilogue, pair_of(0));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + group * 64 + warp % 4 * 16 + half * 8 + g;
    if (row >= p.rows) continue;
    const RowPlace place = row_place<finish>(p.epilogue, row);
    HeadPlace at = first_head;
#pragma unroll
    for (int batch = 0; batch < kFeatures / 16; batch += kBatch) {
      HeadPlace ahead = at;
      float4 rotations[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (wide && first_feature + (batch + i) * 16 < p.features)
          rotations[i] = rotation_of_both<finish>(p.epilogue, place, ahead);
        ahead = further(p.epilogue, ahead, 8);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int tile = batch + i, pair = pair_of(tile);
        if (first_feature + tile * 16 >= p.features) continue;
        const float4 v = make_float4(acc[8 * tile + 2 * half], acc[8 * tile + 2 * half + 1],
                                     acc[8 * tile + 4 + 2 * half], acc[8 * tile + 4 + 2 * half + 1]);
        if (wide) {
          apply_both<finish>(p.epilogue, place, pair, at, v, rotations[i]);
        } else {
          const HeadPlace next{at.head, at.i + 1};  // a tile is of one head
          apply<finish>(p.epilogue, place, pair, at, make_float2(v.x, v.y),
                        rotation_of<finish>(p.epilogue, place, at));
          apply<finish>(p.epilogue, place, pair + 1, next, make_float2(v.z, v.w),
                        rotation_of<finish>(p.epilogue, place, next));
        }
        at = further(p.epilogue, at, 8);
      }
    }
  }
#endif
}

/// The most that wgmma can do: the same products of one stage, over and over.
__global__ void __launch_bounds__(256, 1) peak_wgmma(int rounds, float* never) {
#ifdef QWEN2VL_HAS_WGMMA
  uint8_t* shared = shared_memory();
  for (int i = static_cast<int>(threadIdx.x); i < (128 + 160) * 64; i += 256)
    reinterpret_cast<uint16_t*>(shared)[i] = static_cast<uint16_t>(0x3f80u + (i * 2654435761u >> 25));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  float acc[80] = {};
  const uint64_t a = operand(shared + threadIdx.x / 128 * 8192, 128), b = operand(shared + 16384, 128);
  for (int r = 0; r < rounds; ++r) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma(WgmmaBF16(), acc, a + k * kOperandStep, b + k * kOperandStep, 1);
    wgmma_commit();
    wgmma_wait<0>();
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 80; ++i) sum += acc[i];
  if (sum == 12345.0f) *never = sum;
#endif
}

}  // namespace qwen2vl::cuda
