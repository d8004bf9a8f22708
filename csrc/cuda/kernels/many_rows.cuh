#pragma once

// y = x W^T for many rows, both sides bf16, on any chip with mma.sync (sm_80 on); wgmma_rows.cuh is its
// faster twin where the chip has wgmma. Arithmetic-bound: a block computes 128 rows x 128 features in steps
// of 32 columns, three steps of both operands on their way into shared memory while one is multiplied; a warp
// has 64 x 32 of them, so an operand read from shared memory is used 4 (rows) or 4 (features) times. Rows of
// 32 values are padded to 40 there: eight rows of a matrix then lie in different banks. A sum runs over the
// columns in order: rows are independent.

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/packed.cuh"

namespace qwen2vl::cuda {

struct ManyRows {
  const uint16_t* x;  ///< [rows][columns]
  const uint16_t* w;  ///< [features][columns]
  int32_t rows, features;
  int32_t columns;     ///< a multiple of 64
  int32_t first_pair;  ///< what features 0 and 1 are
  Epilogue epilogue;
};

inline constexpr int kManyRowsTile = 128, kManyRowsStep = 32, kManyRowsStages = 3, kManyRowsPitch = 40;
inline constexpr int64_t kManyRowsSharedBytes =
    int64_t{2} * kManyRowsStages * 2 * kManyRowsTile * kManyRowsPitch;

/// Grid: (tiles of rows, tiles of features).
template <Finish finish>
CHIP_KERNEL void CHIP_BOUNDS(256, 2) many_rows(ManyRows p) {
  constexpr int kTile = kManyRowsTile, kStep = kManyRowsStep, kPitch = kManyRowsPitch;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_row = static_cast<int>(blockIdx.x) * kTile,
            first_feature = static_cast<int>(blockIdx.y) * kTile;
  const int warp_row = warp % 2 * 64, warp_feature = warp / 2 * 32;
  const Shared<uint16_t> shared = shared_cast<uint16_t>(shared_memory());  // [stage][x, w][kTile][kPitch]

  wait_for_previous_launch();
  let_next_launch_start();
  const int steps = p.columns / kStep;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const Shared<uint16_t> stage = shared + step % kManyRowsStages * 2 * kTile * kPitch;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int piece = thread + i % 2 * 256, row = piece / 4, column = piece % 4 * 8;
        const bool is_w = i >= 2;
        const int at = (is_w ? first_feature : first_row) + row;
        const bool valid = at < (is_w ? p.features : p.rows);
        const uint16_t* from =
            (is_w ? p.w : p.x) + (valid ? static_cast<int64_t>(at) * p.columns + step * kStep + column : 0);
        copy_async(shared_cast<uint4>(stage + (is_w ? kTile * kPitch : 0) + row * kPitch + column), from,
                   valid);
      }
    }
    copy_commit();
  };
  fetch(0);
  fetch(1);

  float acc[4][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<kManyRowsStages - 2>();
    __syncthreads();
    fetch(step + kManyRowsStages - 1);
    const Shared<uint16_t> x = shared + step % kManyRowsStages * 2 * kTile * kPitch;
    const Shared<uint16_t> w = x + kTile * kPitch;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[4][4], b[2][4];
#pragma unroll
      for (int m = 0; m < 4; ++m)
        load_matrices(a[m], x + (warp_row + m * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        load_matrices(b[n],
                      w + (warp_feature + n * 16 + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma_bf16(acc[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }

  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp_row + m * 16 + half * 8 + g;
      if (row >= p.rows) continue;
      const RowPlace place = row_place<finish>(p.epilogue, row);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int feature = first_feature + warp_feature + n * 8;
        if (feature >= p.features) continue;
        const int pair = p.first_pair + feature / 16 * 8 + 2 * t + n % 2;  // as expand_rows orders them
        const HeadPlace at = head_place(p.epilogue, pair);
        const float2 add = start<finish>(p.epilogue, place, pair);
        apply<finish>(p.epilogue, place, pair, at,
                      make_float2(acc[m][n][2 * half] + add.x, acc[m][n][2 * half + 1] + add.y),
                      rotation_of<finish>(p.epilogue, place, at));
      }
    }
}

}  // namespace qwen2vl::cuda
