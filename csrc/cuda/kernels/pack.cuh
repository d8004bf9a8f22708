#pragma once

// Rows of a GGUF file into the tiles of packed.cuh, and back out of them: as bf16 rows for products of many
// rows, or one row as float32 (an embedding). Packing happens once, at load: a thread takes a slot's block
// apart and writes the bytes that are the slot's alone.

#include "cuda/kernels/gguf_rows.cuh"
#include "cuda/kernels/packed.cuh"

namespace qwen2vl::cuda {

struct PackRows {
  int64_t cols;                ///< of the rows; what a unit has beyond is zero
  const uint8_t* const* rows;  ///< [tile][16 slots] addresses, null for a row of zeros
  int64_t tiles, units;
  uint8_t* low;  ///< as of PackedMatrix
  uint8_t* high;
  uint8_t* scales;
  uint8_t* minima;
  uint8_t* supers;
};

/// Columns that a thread packs: a unit, or a block that is larger.
template <DType T>
inline constexpr int kPackedAtOnce = RowPiece<T>::kColumns > kUnit ? RowPiece<T>::kColumns : kUnit;

CHIP_DEVICE void put_half(uint8_t* to, int i, uint16_t half) { reinterpret_cast<uint16_t*>(to)[i] = half; }

/// The integers of 32 columns, `block` of unit `at`, of slot g + 8 s.
template <DType T>
CHIP_DEVICE void pack_integers(const PackRows& p, int64_t at, int block, int g, int s, const uint8_t* q) {
  constexpr PackedFormat kFormat = kPackedFormat<T>;
  constexpr int kLow = kFormat.low_bits, kHigh = kFormat.high_bits;
  constexpr bool kTable = kFormat.has_table;
  for (int t = 0; t < 4; ++t) {
    const int64_t lane = at * 32 + 4 * g + t;
    const auto stored = [&](int i, int e) -> uint32_t { return q[i / 2 * 16 + 4 * t + i % 2 * 2 + e]; };
    // A word of the two-bit planes has a byte of every slot and e.
    const auto put_twos = [&](uint8_t* plane, int shift) {
      for (int e = 0; e < 2; ++e) {
        uint32_t byte = 0;
        for (int i = 0; i < 4; ++i) byte |= (stored(i, e) >> shift & 3u) << (2 * i);
        plane[8 * lane + 4 * block + s + 2 * e] = static_cast<uint8_t>(byte);
      }
    };
    if constexpr (kLow == 8) {
      for (int step = 0; step < 2; ++step) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i)
          for (int e = 0; e < 2; ++e) word |= stored(2 * step + i, e) << (8 * i + 16 * e);
        reinterpret_cast<uint32_t*>(p.low)[4 * (lane + (at + block) * 32) + 2 * s + step] = word;
      }
    } else if constexpr (kLow == 4) {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e) word |= (stored(i, e) & 15u) << (kTable ? 8 * i + 4 * e : 4 * i + 16 * e);
      reinterpret_cast<uint32_t*>(p.low)[4 * lane + 2 * block + s] = word;
    } else {
      put_twos(p.low, 0);
    }
    if constexpr (kHigh == 2) put_twos(p.high, kLow);
    if constexpr (kHigh == 1)
      for (int e = 0; e < 2; ++e) {
        uint32_t bits = 0;
        for (int i = 0; i < 4; ++i) bits |= (stored(i, e) >> kLow & 1u) << i;
        uint8_t& byte = p.high[4 * lane + s + 2 * e];  // blocks come in order, from one thread
        byte = static_cast<uint8_t>(block == 0 ? bits : byte | bits << 4);
      }
  }
}

/// The scales of the same, from `first` of the opened block on.
template <DType T>
CHIP_DEVICE void pack_scales(const PackRows& p, int64_t at, int block, int g, int s, const OpenBlock& open,
                             int first) {
  constexpr PackedFormat kFormat = kPackedFormat<T>;
  uint8_t* scales = p.scales + (at * 8 + g) * 8;
  if constexpr (kFormat.scales == Scales::Halves) {
    put_half(scales, 2 * block + s, open.d);
    if constexpr (kFormat.has_minimum) put_half(p.minima + (at * 8 + g) * 8, 2 * block + s, open.m);
  } else if constexpr (kFormat.scales == Scales::Blocks) {
    scales[4 * block + 2 * s] = static_cast<uint8_t>(open.scales[first / 32]);
    scales[4 * block + 2 * s + 1] = kFormat.has_minimum ? static_cast<uint8_t>(open.minima[first / 32]) : 0;
  } else {
    for (int step = 0; step < 2; ++step) {
      int byte = open.scales[first / 16 + step];
      if constexpr (kFormat.has_minimum) byte |= open.minima[first / 16 + step] << 4;
      scales[4 * block + 2 * step + s] = static_cast<uint8_t>(byte);
    }
  }
}

/// Of floats: what mma's operand is made of.
template <DType T>
CHIP_DEVICE void pack_floats(const PackRows& p, int64_t at, int64_t first, int g, int s, const uint8_t* row) {
  const auto value = [&](int64_t k) { return row == nullptr || k >= p.cols ? 0.0f : float_value<T>(row, k); };
  for (int vector = 0; vector < 4; ++vector)
    for (int t = 0; t < 4; ++t)
      for (int i = 0; i < 2; ++i) {
        const int64_t k = first + 16 * vector + 4 * t + 2 * i;
        reinterpret_cast<uint32_t*>(p.low)[4 * ((4 * at + vector) * 32 + 4 * g + t) + 2 * i + s] =
            pack_bf16(value(k), value(k + 1));
      }
}

/// A thread a slot and kPackedAtOnce columns, slots first.
template <DType T>
CHIP_KERNEL void CHIP_BOUNDS(128, 4) pack_rows(PackRows p) {
  constexpr int kColumns = RowPiece<T>::kColumns, kBytes = RowPiece<T>::kBytes, kAll = kPackedAtOnce<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t parts = p.units * kUnit / kAll, tile = i / kTileSlots / parts;
  if (tile >= p.tiles) return;
  const int slot = static_cast<int>(i % kTileSlots), g = slot % 8, s = slot / 8;
  const int64_t first = i / kTileSlots % parts * kAll, at = tile * p.units + first / kUnit;
  const uint8_t* row = p.rows[tile * kTileSlots + slot];
  if constexpr (!RowPiece<T>::kQuantized) {
    pack_floats<T>(p, at, first, g, s, row);
  } else {
    for (int begin = 0; begin < kAll; begin += kColumns) {
      OpenBlock open;
      if (row == nullptr || first + begin >= p.cols)
        open = OpenBlock{};
      else
        open_block_at<T>(row + (first + begin) / kColumns * kBytes, open);
      for (int k = 0; k < kColumns; k += kBlock) {
        const int64_t unit = at + (begin + k) / kUnit;
        const int block = (begin + k) / kBlock % 2;
        pack_integers<T>(p, unit, block, g, s, open.q + k);
        pack_scales<T>(p, unit, block, g, s, open, k);
      }
      constexpr PackedFormat kFormat = kPackedFormat<T>;
      if constexpr (kFormat.scales != Scales::Halves) {
        constexpr int kEach = kFormat.has_minimum ? 8 : 4;
        uint8_t* supers = p.supers + (at / 4 * 8 + g) * kEach;
        put_half(supers, s, open.d);
        if constexpr (kFormat.has_minimum) put_half(supers, 2 + s, open.m);
      }
    }
  }
}

/// Tiles back into rows of bf16 [tiles * 16][units * 64]. A pair's two features are neighbours, so that both
/// come out in one lane of a product; pairs 0, 2, 4, 6 of a tile come before 1, 3, 5, 7, so that a lane has
/// two neighbouring pairs in two neighbouring matrices of 8 columns: the row of slot a of pair g is 16 tile +
/// 8 (g % 2) + g - g % 2. Grid: tiles x units / 4 warps, a block of 4 warps for four neighbouring units.
template <DType T>
CHIP_KERNEL void expand_rows(PackedMatrix m, uint16_t* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int unit = static_cast<int>(blockIdx.x) * 4 + static_cast<int>(threadIdx.x) / 32;
  const int64_t tile = blockIdx.y;
  if (unit >= m.units) return;
  Unit<T> u;
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
      if constexpr (Unit<T>::kScaled) {
        const float2 s = u.scale(block, step), minimum = u.minimum(block, step);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 v = unpack_bf16(a[i]);
          const float scale = i % 2 == 0 ? s.x : s.y;
          if constexpr (Unit<T>::kHasMinimum) {
            const float less = i % 2 == 0 ? minimum.x : minimum.y;
            a[i] = pack_bf16(v.x * scale - less, v.y * scale - less);
          } else {
            a[i] = pack_bf16(v.x * scale, v.y * scale);
          }
        }
      }
      *reinterpret_cast<uint2*>(to + block * kBlock + step * 16) = make_uint2(a[0], a[2]);
      *reinterpret_cast<uint2*>(to + stride + block * kBlock + step * 16) = make_uint2(a[1], a[3]);
    }
}

/// Value (feature, column) of a matrix whose pair p is features 2 p and 2 p + 1.
template <DType T>
CHIP_DEVICE float packed_value(const PackedMatrix& m, int64_t feature, int64_t column) {
  const int64_t tile = feature / kTileSlots, at = tile * m.units + column / kUnit;
  const int g = static_cast<int>(feature % kTileSlots / 2), b = static_cast<int>(feature % 2);
  const int within = static_cast<int>(column % kUnit), block = within / kBlock, step = within % kBlock / 16,
            t = within % 16 / 4, e = within % 4;
  Unit<T> u;
  u.load(m, at, 4 * g + t);
  uint32_t a[4];
  u.operand(block, step, a);
  const float2 v = unpack_bf16(a[b + 2 * (e / 2)]);
  const float2 s = u.scale(block, step), minimum = u.minimum(block, step);
  const float x = (e % 2 == 0 ? v.x : v.y) * (b == 0 ? s.x : s.y);
  return Unit<T>::kHasMinimum ? x - (b == 0 ? minimum.x : minimum.y) : x;
}

}  // namespace qwen2vl::cuda
