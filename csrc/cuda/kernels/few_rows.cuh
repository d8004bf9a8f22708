#pragma once

// y = x W^T for a few rows (decoding: one a sequence), W quantized.
//
// What bounds it is reading W once. A block takes a tile of 16 output features after another; its warps split
// the columns, so that a small matrix keeps the whole chip reading; each lane loads 16-byte vectors of
// weights straight into registers, a piece ahead, and hands them as bf16 to mma, whose other side holds 8
// rows at a time: the first 8 rows cost the same as one. Sums of a scale's block are multiplied by it in
// float32. The warps' sums meet in shared memory, in the order of the columns, whatever the number of rows: a
// row's result has the same bits alone and among others. What does not depend on the launch before (weights,
// a norm's weights) is on its way before the wait for it. Up to 8 rows are brought into shared memory first,
// one or two through RMSNorm; more are read as they are needed, for two tiles at a time.

#include <type_traits>

#include "cuda/chip.h"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/packed.cuh"

namespace qwen2vl::cuda {

inline constexpr int kNormedRows = 2;  ///< that a block normalizes by itself

struct FewRows {
  PackedMatrix m;
  int32_t rows = 0;
  const uint16_t* input = nullptr;  ///< bf16 [rows][units * 64]
  const float* x = nullptr;         ///< or float32 [rows][width], of which RMSNorm is taken first
  const float* norm = nullptr;
  float eps = 0;
  int32_t width = 0;
  Finish finish = Finish::Store;
  Epilogue epilogue;
};

/// Tiles of features that a block of so many threads at most computes at once: what its registers hold, or
/// nearly. (Of 512 threads, a few words spill; with a tile at a time 64 rows of down_proj took 37 us instead
/// of 22.)
CHIP_HOST_DEVICE constexpr int tiles_at_once(DType type, int row_tiles, int threads) {
  if (row_tiles == 1 || type == DType::BF16) return 1;
  return threads <= 256 || type == DType::Q4_0 || type == DType::Q8_0 ? 2 : 1;
}

/// Shared memory: the warps' sums, and the rows.
CHIP_HOST_DEVICE int64_t few_rows_shared_bytes(const FewRows& p, int warps, int row_tiles, bool shared) {
  const int64_t sums =
      int64_t{4} * warps * tiles_at_once(p.m.type, row_tiles, 32 * warps) * row_tiles * 8 * kTileSlots;
  if (!shared) return sums;
  return sums + int64_t{2} * p.rows * p.m.units * kUnit;
}

/// Calls fn with the way of finishing as a compile-time constant; the vision tower's have many rows.
template <typename Fn>
CHIP_DEVICE void with_finish(Finish finish, const Fn& fn) {
  switch (finish) {
    case Finish::Store:
      return fn(std::integral_constant<Finish, Finish::Store>());
    case Finish::Residual:
      return fn(std::integral_constant<Finish, Finish::Residual>());
    case Finish::SwiGlu:
      return fn(std::integral_constant<Finish, Finish::SwiGlu>());
    case Finish::TextQkv:
      return fn(std::integral_constant<Finish, Finish::TextQkv>());
    default:
      return;
  }
}

/// RMSNorm of x [rows][width] into `to` [rows][stride] as bf16. `norms`: what the thread has read of the
/// norm's weights, vectors thread, thread + threads, ...
template <int kNorms>
CHIP_DEVICE void share_normed(const FewRows& p, int stride, const float4 (&norms)[kNorms],
                              Shared<uint16_t> to) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x),
            vectors = p.width / 4;
  for (int row = 0; row < p.rows; ++row) {
    const float* x = p.x + static_cast<int64_t>(row) * p.width;
    const float r = warp_rms(x, p.width, p.eps, thread % 32);  // by every warp for itself: no barrier
    if (p.width % 4 != 0) {
      for (int i = thread; i < stride; i += threads)
        to[row * stride + i] =
            static_cast<uint16_t>(pack_bf16(i < p.width ? x[i] * r * p.norm[i] : 0.0f, 0.0f));
      continue;
    }
    const auto put = [&](int i, float4 w) {
      const float4 v = reinterpret_cast<const float4*>(x)[i];
      shared_cast<uint2>(to + row * stride)[i] =
          make_uint2(pack_bf16(v.x * r * w.x, v.y * r * w.y), pack_bf16(v.z * r * w.z, v.w * r * w.w));
    };
#pragma unroll
    for (int i = 0; i < kNorms; ++i)
      if (thread + i * threads < vectors) put(thread + i * threads, norms[i]);
    for (int i = thread + kNorms * threads; i < vectors; i += threads)
      put(i, reinterpret_cast<const float4*>(p.norm)[i]);
    for (int i = p.width + thread; i < stride; i += threads) to[row * stride + i] = 0;
  }
  __syncthreads();
}

/// Grid: (blocks, which take tiles in turns; groups of 8 kRowTiles rows). kShared: rows are brought into
/// shared memory. kThreads: at most.
template <DType T, int kRowTiles, bool kShared, int kThreads>
CHIP_KERNEL void CHIP_BOUNDS(kThreads, 1) few_rows(FewRows p) {
  constexpr int kTiles = tiles_at_once(T, kRowTiles, kThreads);
  // Units a piece: in the 2B shape a warp has three of most matrices; more rows need the registers.
  constexpr uint32_t kOnes[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
  constexpr int kAhead = kRowTiles == 1 ? (T == DType::BF16 ? 1 : 3) : 1;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int warps = threads / 32, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int begin = p.m.units * warp / warps, end = p.m.units * (warp + 1) / warps,
            stride = p.m.units * kUnit;
  const int first_row = static_cast<int>(blockIdx.y) * 8 * kRowTiles;
  const int step_tiles = static_cast<int>(gridDim.x) * kTiles;
  const Shared<float> sums = shared_cast<float>(shared_memory());
  const Shared<uint16_t> rows = shared_cast<uint16_t>(sums + warps * kTiles * kRowTiles * 8 * kTileSlots);

  Unit<T> now[kTiles][kAhead], next[kTiles][kAhead];
  const auto fetch = [&](int tile, int unit, Unit<T>(&to)[kTiles][kAhead]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int64_t at = static_cast<int64_t>(min(tile + j, p.m.tiles - 1)) * p.m.units + unit;
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (unit + i < end) to[j][i].load(p.m, at + i, lane);
    }
  };
  int tile = static_cast<int>(blockIdx.x) * kTiles;
  if (tile < p.m.tiles && begin < end) fetch(tile, begin, now);
  constexpr int kNorms =
      3;  // vectors of the norm's weights that a thread has at hand: with 128 threads, all of 1,536
  float4 norms[kNorms];
  if (kShared && p.x != nullptr && p.width % 4 == 0)
#pragma unroll
    for (int i = 0; i < kNorms; ++i)
      if (thread + i * threads < p.width / 4)
        norms[i] = reinterpret_cast<const float4*>(p.norm)[thread + i * threads];
  let_next_launch_start();
  wait_for_previous_launch();

  // What the first tile's pair of this thread needs at the end comes meanwhile.
  const int own_row = first_row + thread / 8, own_pair = p.m.first_pair + tile * kTilePairs + thread % 8;
  const bool own = kRowTiles == 1 && thread < 64 && own_row < p.rows && tile < p.m.tiles;
  uint16_t* own_page = nullptr;
  HeadPlace own_head;
  float2 own_start{}, own_rotation{};
  if (own)
    with_finish(p.finish, [&](auto finish) {
      constexpr Finish kFinish = decltype(finish)::value;
      const RowPlace place = row_place<kFinish>(p.epilogue, own_row);
      own_page = place.page;
      own_head = head_place(p.epilogue, own_pair);
      own_start = start<kFinish>(p.epilogue, place, own_pair);
      own_rotation = rotation_of<kFinish>(p.epilogue, place, own_head);
    });

  if constexpr (kShared) {
    if (p.x != nullptr) {
      share_normed(p, stride, norms, rows);
    } else {
      for (int i = thread; i < p.rows * stride / 8; i += threads)
        shared_cast<uint4>(rows)[i] = reinterpret_cast<const uint4*>(p.input)[i];
      __syncthreads();
    }
  }

  for (; tile < p.m.tiles; tile += step_tiles) {
    float acc[kTiles][kRowTiles][4] = {};
    for (int unit = begin; unit < end; unit += kAhead) {
      if (unit + kAhead < end)
        fetch(tile, unit + kAhead, next);
      else if (tile + step_tiles < p.m.tiles)
        fetch(tile + step_tiles, begin, next);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (unit + i >= end) continue;
        uint2 b[kRowTiles][4];
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
          // Columns of rows that there are not get the last one's: what becomes of them is not looked at.
          const int row = min(first_row + n * 8 + g, p.rows - 1), column = (unit + i) * kUnit + 4 * t;
#pragma unroll
          for (int step = 0; step < 4; ++step)
            if constexpr (kShared)
              b[n][step] = shared_cast<uint2>(rows + row * stride + column + step * 16)[0];
            else
              b[n][step] = *reinterpret_cast<const uint2*>(p.input + static_cast<int64_t>(row) * stride +
                                                           column + step * 16);
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            float part[kRowTiles][4], total[kRowTiles][4];
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              uint32_t a[4];
              now[j][i].operand(block, step, a);
              const float2 s = now[j][i].scale(block, step);
#pragma unroll
              for (int n = 0; n < kRowTiles; ++n) {
                const uint2 bn = b[n][2 * block + step];
                if constexpr (!Unit<T>::kScaled) {
                  mma_bf16(acc[j][n], a, bn.x, bn.y);
                } else {
                  const auto add = [&](const uint32_t (&factors)[4], float (&to)[4]) {
                    if (Unit<T>::kScalePerStep || step == 0)
                      mma_bf16_first(to, factors, bn.x, bn.y);
                    else
                      mma_bf16(to, factors, bn.x, bn.y);
                  };
                  add(a, part[n]);
                  // What the minima are multiplied with: the sums of the inputs.
                  if constexpr (Unit<T>::kHasMinimum) add(kOnes, total[n]);
                  if (Unit<T>::kScalePerStep || step == 1) {
                    acc[j][n][0] += s.x * part[n][0];
                    acc[j][n][1] += s.x * part[n][1];
                    acc[j][n][2] += s.y * part[n][2];
                    acc[j][n][3] += s.y * part[n][3];
                    if constexpr (Unit<T>::kHasMinimum) {
                      const float2 m = now[j][i].minimum(block, step);
                      acc[j][n][0] -= m.x * total[n][0];
                      acc[j][n][1] -= m.x * total[n][1];
                      acc[j][n][2] -= m.y * total[n][2];
                      acc[j][n][3] -= m.y * total[n][3];
                    }
                  }
                }
              }
            }
          }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < kAhead; ++i) now[j][i] = next[j][i];
    }

    // [warp][tile][row][slot]
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int n = 0; n < kRowTiles; ++n) {
        const Shared<float> to = sums + (((warp * kTiles + j) * kRowTiles + n) * 8 + 2 * t) * kTileSlots;
        to[g] = acc[j][n][0];
        to[kTileSlots + g] = acc[j][n][1];
        to[g + 8] = acc[j][n][2];
        to[kTileSlots + g + 8] = acc[j][n][3];
      }
    __syncthreads();
    for (int i = thread; i < kTiles * kRowTiles * 64; i += threads) {
      const int j = i / (kRowTiles * 64), row = first_row + i / 8 % (kRowTiles * 8);
      const int pair = p.m.first_pair + (tile + j) * kTilePairs + i % 8;
      if (row >= p.rows || tile + j >= p.m.tiles) continue;
      float2 v = make_float2(0.0f, 0.0f);
#pragma unroll 8
      for (int w = 0; w < warps; ++w) {
        const Shared<float> from = sums + (w * kTiles * kRowTiles * 8 + i / 8) * kTileSlots + i % 8;
        v.x += from[0];
        v.y += from[8];
      }
      const bool prepared = own && i == thread && pair == own_pair;
      with_finish(p.finish, [&](auto finish) {
        constexpr Finish kFinish = decltype(finish)::value;
        const RowPlace place = row_place<kFinish>(p.epilogue, row, prepared ? own_page : nullptr);
        const HeadPlace head = prepared ? own_head : head_place(p.epilogue, pair);
        const float2 add = prepared ? own_start : start<kFinish>(p.epilogue, place, pair);
        const float2 rotation = prepared ? own_rotation : rotation_of<kFinish>(p.epilogue, place, head);
        apply<kFinish>(p.epilogue, place, pair, head, make_float2(v.x + add.x, v.y + add.y), rotation);
      });
    }
    if (tile + step_tiles < p.m.tiles) __syncthreads();
  }
}

}  // namespace qwen2vl::cuda
