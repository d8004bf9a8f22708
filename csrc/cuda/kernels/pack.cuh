#pragma once

// Rows of a GGUF file into the tiles of packed.cuh, and back out of them: as bf16 rows for products of many
// rows, or one row as float32 (an embedding). Packing happens once, at load: a warp a unit, every lane
// gathers its own words.

#include "cuda/kernels/gguf_rows.cuh"
#include "cuda/kernels/packed.cuh"

namespace qwen2vl::cuda {

struct PackRows {
  DType type;                  ///< of the rows
  int64_t cols;                ///< of the rows; what a unit has beyond is zero
  const uint8_t* const* rows;  ///< [tile][16 slots] addresses, null for a row of zeros
  int32_t tiles, units;
  uint4* quants;
  uint2* high;
  uint2* scales;
  uint32_t* supers;
};

struct LaneSource {
  DType type;
  int64_t cols;
  const uint8_t* row;

  /// The stored integer, or `zero` beyond the matrix.
  CHIP_DEVICE uint32_t stored(int64_t k, int zero) const {
    return static_cast<uint32_t>(row == nullptr || k >= cols ? zero : stored_value(type, row, k));
  }
  CHIP_DEVICE float value(int64_t k) const {
    return row == nullptr || k >= cols ? 0.0f : row_value(type, row, k);
  }
  CHIP_DEVICE uint32_t half_at(int64_t block, int64_t block_bytes, int64_t offset,
                               int64_t block_columns) const {
    if (row == nullptr || block * block_columns >= cols) return 0;
    const uint8_t* p = row + block * block_bytes + offset;
    return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
  }
};

/// Grid: (units, tiles), a warp each.
CHIP_KERNEL void pack_rows(PackRows p) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  const int64_t unit = blockIdx.x, tile = blockIdx.y, at = tile * p.units + unit;
  const LaneSource slots[2] = {{p.type, p.cols, p.rows[tile * kTileSlots + g]},
                               {p.type, p.cols, p.rows[tile * kTileSlots + 8 + g]}};
  const int64_t first = unit * kUnit + 4 * t;  // of block 0, step 0

  if (p.type == DType::Q4_0 || p.type == DType::Q6_K) {
    const int zero = p.type == DType::Q4_0 ? 8 : 32;
    uint32_t words[4], high[2] = {0, 0};
    for (int block = 0; block < 2; ++block)
      for (int b = 0; b < 2; ++b) {
        uint32_t word = 0;
        for (int i = 0; i < 4; ++i)
          for (int e = 0; e < 2; ++e) {
            const uint32_t q = slots[b].stored(first + block * kBlock + (i / 2) * 16 + (i % 2) * 2 + e, zero);
            word |= (q & 15u) << (4 * i + 16 * e);
            high[block] |= (q >> 4 & 3u) << (2 * i + 8 * b + 16 * e);
          }
        words[2 * block + b] = word;
      }
    p.quants[at * 32 + lane] = make_uint4(words[0], words[1], words[2], words[3]);
    if (p.type == DType::Q6_K) p.high[at * 32 + lane] = make_uint2(high[0], high[1]);
  } else if (p.type == DType::Q8_0) {
    for (int block = 0; block < 2; ++block) {
      uint32_t words[4];
      for (int b = 0; b < 2; ++b)
        for (int step = 0; step < 2; ++step) {
          const int64_t k = first + block * kBlock + step * 16;
          words[2 * b + step] = (slots[b].stored(k, 0) & 255u) | (slots[b].stored(k + 2, 0) & 255u) << 8 |
                                (slots[b].stored(k + 1, 0) & 255u) << 16 |
                                (slots[b].stored(k + 3, 0) & 255u) << 24;
        }
      p.quants[at * 64 + block * 32 + lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  } else {
    for (int block = 0; block < 2; ++block)
      for (int step = 0; step < 2; ++step) {
        const int64_t k = first + block * kBlock + step * 16;
        p.quants[at * 128 + (2 * block + step) * 32 + lane] =
            make_uint4(pack_bf16(slots[0].value(k), slots[0].value(k + 1)),
                       pack_bf16(slots[1].value(k), slots[1].value(k + 1)),
                       pack_bf16(slots[0].value(k + 2), slots[0].value(k + 3)),
                       pack_bf16(slots[1].value(k + 2), slots[1].value(k + 3)));
      }
  }

  if (t != 0) return;
  if (p.type == DType::Q4_0 || p.type == DType::Q8_0) {
    const int64_t bytes = p.type == DType::Q4_0 ? 18 : 34;
    uint32_t words[2];
    for (int block = 0; block < 2; ++block)
      words[block] = slots[0].half_at(2 * unit + block, bytes, 0, kBlock) |
                     slots[1].half_at(2 * unit + block, bytes, 0, kBlock) << 16;
    p.scales[at * 8 + g] = make_uint2(words[0], words[1]);
  } else if (p.type == DType::Q6_K) {
    uint32_t words[2] = {0, 0};
    for (int group = 0; group < 4; ++group)
      for (int b = 0; b < 2; ++b) {
        const int64_t k = unit * kUnit + group * 16;
        const uint32_t scale =
            slots[b].row == nullptr || k >= p.cols ? 0u : slots[b].row[k / 256 * 210 + 192 + k % 256 / 16];
        words[group / 2] |= scale << (16 * (group % 2) + 8 * b);
      }
    p.scales[at * 8 + g] = make_uint2(words[0], words[1]);
    if (unit % 4 == 0)
      p.supers[at / 4 * 8 + g] =
          slots[0].half_at(unit / 4, 210, 208, 256) | slots[1].half_at(unit / 4, 210, 208, 256) << 16;
  }
}

/// Tiles back into rows of bf16 [tiles * 16][units * 64]. A pair's two features are neighbours, so that both
/// come out in one lane of a product; pairs 0, 2, 4, 6 of a tile come before 1, 3, 5, 7, so that a lane has
/// two neighbouring pairs in two neighbouring matrices of 8 columns: the row of slot a of pair g is 16 tile +
/// 8 (g % 2) + g - g % 2. Grid: tiles x units / 4 warps, a block of 4 warps for four neighbouring units.
template <Format format>
CHIP_KERNEL void expand_rows(PackedMatrix m, uint16_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int unit = static_cast<int>(blockIdx.x) * 4 + static_cast<int>(threadIdx.x) / 32;
  const int64_t tile = blockIdx.y;
  if (unit >= m.units) return;
  Unit<format> u;
  u.load(m, tile * m.units + unit, lane);
  const int64_t stride = static_cast<int64_t>(m.units) * kUnit;
  uint16_t* to = out + (tile * kTileSlots + 8 * (g % 2) + g - g % 2) * stride +
                 static_cast<int64_t>(unit) * kUnit + 4 * t;
#pragma unroll
  for (int block = 0; block < 2; ++block)
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
      u.operand(block, step, a);
      if constexpr (Unit<format>::kScaled) {
        const float2 s = u.scale(block, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack_bf16(a[i]);
          const float scale = i % 2 == 0 ? s.x : s.y;
          a[i] = pack_bf16(v.x * scale, v.y * scale);
        }
      }
      *reinterpret_cast<uint2*>(to + block * kBlock + step * 16) = make_uint2(a[0], a[2]);
      *reinterpret_cast<uint2*>(to + stride + block * kBlock + step * 16) = make_uint2(a[1], a[3]);
    }
}

/// Value (feature, column) of a matrix whose pair p is features 2 p and 2 p + 1.
template <Format format>
CHIP_DEVICE float packed_value(const PackedMatrix& m, int64_t feature, int64_t column) {
  const int64_t tile = feature / kTileSlots, at = tile * m.units + column / kUnit;
  const int g = static_cast<int>(feature % kTileSlots / 2), b = static_cast<int>(feature % 2);
  const int within = static_cast<int>(column % kUnit), block = within / kBlock, step = within % kBlock / 16,
            t = within % 16 / 4, e = within % 4;
  Unit<format> u;
  u.load(m, at, 4 * g + t);
  uint32_t a[4];
  u.operand(block, step, a);
  const float2 v = unpack_bf16(a[b + 2 * (e / 2)]);
  const float2 s = u.scale(block, step);
  return (e % 2 == 0 ? v.x : v.y) * (b == 0 ? s.x : s.y);
}

}  // namespace qwen2vl::cuda
