#pragma once

// y = x W^T for a few rows (decoding: one a sequence), W quantized.
//
// What bounds it is reading W once. A block takes a tile of 16 output features after another; its warps split the
// columns, so that a small matrix keeps the whole chip reading; each lane loads 16-byte vectors of weights straight
// into registers, two pieces ahead, and hands them as bf16 to mma, whose other side holds 8 rows at a time: the
// first 8 rows cost the same as one. Sums of a scale's block are multiplied by it in float32. The warps' sums meet
// in shared memory, in the order of the columns, whatever the number of rows: a row's result has the same bits alone
// and among others. RMSNorm of one or two rows is done by every block for itself, while its first weights come.

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

CHIP_HOST_DEVICE int64_t few_rows_shared_bytes(const FewRows& p, int warps, int tiles_of_rows) {
  const int64_t sums = static_cast<int64_t>(warps) * tiles_of_rows * 8 * kTileSlots * 4;
  return sums + (p.x != nullptr ? static_cast<int64_t>(p.rows) * p.m.units * kUnit * 2 : 0);
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

/// Grid: (blocks, which take tiles in turns; groups of 8 kRowTiles rows).
/// kNormed: of x, RMSNorm is taken first; else the input is bf16.
template <Format format, int kRowTiles, bool kNormed>
CHIP_KERNEL void CHIP_BOUNDS(512, 1) few_rows(FewRows p) {
  // Units a piece: in the 2B shape a warp has three of most matrices; more rows need the registers.
  constexpr int kAhead = kRowTiles == 1 ? 3 : format == Format::Sixes ? 1 : 2;
  const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int begin = p.m.units * warp / warps, end = p.m.units * (warp + 1) / warps;
  const int first_row = static_cast<int>(blockIdx.y) * 8 * kRowTiles;
  const Shared<float> sums = shared_cast<float>(shared_memory());
  const Shared<uint16_t> normed = shared_cast<uint16_t>(shared_memory() + warps * kRowTiles * 8 * kTileSlots * 4);

  Unit<format> now[kAhead], next[kAhead];
  const auto fetch = [&](int tile, int unit, Unit<format>(&to)[kAhead]) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (unit + i < end) to[i].load(p.m, static_cast<int64_t>(tile) * p.m.units + unit + i, lane);
  };
  int tile = static_cast<int>(blockIdx.x);
  if (tile < p.m.tiles) fetch(tile, begin, now);
  const int stride = p.m.units * kUnit, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  constexpr int kNorms = 3;  // weights of the norm that a thread has at hand: with 128 threads, all of 1,536
  float4 norms[kNorms];
  const bool whole = p.width % 4 == 0;
  if (kNormed && whole)
#pragma unroll
    for (int i = 0; i < kNorms; ++i)
      if (thread + i * threads < p.width / 4)
        norms[i] = reinterpret_cast<const float4*>(p.norm)[thread + i * threads];
  let_next_launch_start();
  wait_for_previous_launch();

  // What the first tile's pair of this thread needs at the end comes meanwhile.
  const int own_row = first_row + thread / 8, own_pair = p.m.first_pair + tile * kTilePairs + thread % 8;
  const bool own = kRowTiles == 1 && thread < 64 && own_row < p.rows && tile < p.m.tiles;
  RowPlace own_place;
  float2 own_start{}, own_rotation{};
  if (own)
    with_finish(p.finish, [&](auto finish) {
      constexpr Finish kFinish = decltype(finish)::value;
      own_place = row_place<kFinish>(p.epilogue, own_row);
      own_start = start<kFinish>(p.epilogue, own_row, own_pair);
      own_rotation = rotation_of<kFinish>(p.epilogue, own_place, own_pair);
    });

  if constexpr (kNormed) {
    for (int row = 0; row < p.rows; ++row) {
      const float* x = p.x + static_cast<int64_t>(row) * p.width;
      const float r = warp_rms(x, p.width, p.eps, lane);
      const Shared<uint16_t> to = normed + row * stride;
      if (whole) {
        const auto put = [&](int i, float4 w) {
          const float4 v = reinterpret_cast<const float4*>(x)[i];
          shared_cast<uint2>(to)[i] =
              make_uint2(pack_bf16(v.x * r * w.x, v.y * r * w.y), pack_bf16(v.z * r * w.z, v.w * r * w.w));
        };
#pragma unroll
        for (int i = 0; i < kNorms; ++i)
          if (thread + i * threads < p.width / 4) put(thread + i * threads, norms[i]);
        for (int i = thread + kNorms * threads; i < p.width / 4; i += threads)
          put(i, reinterpret_cast<const float4*>(p.norm)[i]);
        for (int i = p.width + thread; i < stride; i += threads) to[i] = 0;
      } else {
        for (int i = thread; i < stride; i += threads)
          to[i] = static_cast<uint16_t>(pack_bf16(i < p.width ? x[i] * r * p.norm[i] : 0.0f, 0.0f));
      }
    }
    __syncthreads();
  }

  for (; tile < p.m.tiles; tile += static_cast<int>(gridDim.x)) {
    float acc[kRowTiles][4] = {};
    for (int unit = begin; unit < end; unit += kAhead) {
      if (unit + kAhead < end)
        fetch(tile, unit + kAhead, next);
      else if (tile + static_cast<int>(gridDim.x) < p.m.tiles)
        fetch(tile + static_cast<int>(gridDim.x), begin, next);
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
            if constexpr (kNormed)
              b[n][step] = shared_cast<uint2>(normed + row * stride + column + step * 16)[0];
            else
              b[n][step] =
                  *reinterpret_cast<const uint2*>(p.input + static_cast<int64_t>(row) * stride + column + step * 16);
        }
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          float part[kRowTiles][4];
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            uint32_t a[4];
            now[i].operand(block, step, a);
#pragma unroll
            for (int n = 0; n < kRowTiles; ++n) {
              const uint2 bn = b[n][2 * block + step];
              if constexpr (!Unit<format>::kScaled) {
                mma_bf16(acc[n], a, bn.x, bn.y);
              } else {
                if (Unit<format>::kScalePerStep || step == 0)
                  mma_bf16_first(part[n], a, bn.x, bn.y);
                else
                  mma_bf16(part[n], a, bn.x, bn.y);
                if (Unit<format>::kScalePerStep || step == 1) {
                  const float2 s = now[i].scale(block, step);
                  acc[n][0] += s.x * part[n][0];
                  acc[n][1] += s.x * part[n][1];
                  acc[n][2] += s.y * part[n][2];
                  acc[n][3] += s.y * part[n][3];
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) now[i] = next[i];
    }

    // [warp][row][slot]
#pragma unroll
    for (int n = 0; n < kRowTiles; ++n) {
      const Shared<float> to = sums + ((warp * kRowTiles + n) * 8 + 2 * t) * kTileSlots;
      to[g] = acc[n][0];
      to[kTileSlots + g] = acc[n][1];
      to[g + 8] = acc[n][2];
      to[kTileSlots + g + 8] = acc[n][3];
    }
    __syncthreads();
    for (int i = thread; i < kRowTiles * 64; i += threads) {
      const int row = first_row + i / 8, pair = p.m.first_pair + tile * kTilePairs + i % 8;
      if (row >= p.rows) continue;
      float2 v = make_float2(0.0f, 0.0f);
#pragma unroll 8
      for (int w = 0; w < warps; ++w) {
        const Shared<float> from = sums + (w * kRowTiles * 8 + i / 8) * kTileSlots + i % 8;
        v.x += from[0];
        v.y += from[8];
      }
      const bool prepared = own && i == thread && pair == own_pair;
      with_finish(p.finish, [&](auto finish) {
        constexpr Finish kFinish = decltype(finish)::value;
        const RowPlace place = prepared ? own_place : row_place<kFinish>(p.epilogue, row);
        const float2 add = prepared ? own_start : start<kFinish>(p.epilogue, row, pair);
        const float2 rotation = prepared ? own_rotation : rotation_of<kFinish>(p.epilogue, place, pair);
        apply<kFinish>(p.epilogue, place, pair, make_float2(v.x + add.x, v.y + add.y), rotation);
      });
    }
    if (tile + static_cast<int>(gridDim.x) < p.m.tiles) __syncthreads();
  }
}

}  // namespace qwen2vl::cuda
