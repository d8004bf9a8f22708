#pragma once

// Weight matrices as the kernels read them. A matrix is a list of pairs of output features (a, b); a tile
// holds 8 pairs: slots 0..7 are the a's, slots 8..15 the b's, which are rows g and g + 8 of mma's 16 x 16
// operand, so that one lane ends up with both features of a pair: gate and up of SwiGLU, the two dimensions
// that RoPE turns, or simply features 2 p and 2 p + 1.
//
// Columns come in units of 64 (two blocks of 32, two steps of 16 each; zeros beyond the matrix). Lane 4 g + t
// of a warp holds, of slots g and g + 8, the four columns 16 step + 4 t .. + 3 of every step: two words of
// mma's operand in another order of k than mma's own, which is free as long as the other operand has the
// same. So every lane reads whole vectors of up to 16 bytes, a warp neighbouring ones, and nothing is
// shuffled.
//
// What a type's integers and scales are, its QuantFormat (quant/formats.h) says. A lane has 32 values of a
// unit: as many words as a value has bits, its high bits apart. With i = 2 step + 0..1 a block's pair of
// columns, e = 0..1 the column of the pair, s = 1 of slots 8 and beyond:
//
//   bits of a value   words of a lane       where the bits of (block, s, i, e) stand
//   16 (bf16)         [block][step][4]      mma's four words
//   8                 [block][s][step]      bytes: columns 0, 2, 1, 3 of the four
//   4                 [block][s]            bits 4 i + 16 e; of a type with a table: 8 i + 4 e
//   2 (low or high)   [block]               bits 2 i + 8 s + 16 e
//   1 (high)          one                   bit i + 4 block + 8 s + 16 e
//
// Scales of a unit are eight bytes a pair of slots, shared by the four lanes of a slot:
//
//   Halves            f16 [block][s]; minima the same, apart
//   Steps             int8 [block][step][s]
//   StepNibbles       uint8 [block][step][s]: the scale, and the minimum in the high nibble
//   Blocks            int8 [block][s][scale, minimum]
//
// and but for Halves the f16 of 256 columns [s] that they are multiplied with, the minima's behind.

#include <bit>
#include <type_traits>

#include "cuda/chip.h"
#include "quant/formats.h"

namespace qwen2vl::cuda {

inline constexpr int kTilePairs = 8, kTileSlots = 16, kUnit = 64, kBlock = 32;

enum class Scales : int32_t { None, Halves, Steps, StepNibbles, Blocks };

/// A type as the tiles have it; those of floats are bf16 there.
struct PackedFormat {
  int low_bits = 16, high_bits = 0;
  int offset = 0;
  bool has_minimum = false, has_table = false;
  Scales scales = Scales::None;

  constexpr PackedFormat(const QuantFormat& f) {
    if (f.bits() == 0) return;
    high_bits = f.bits() % 4 == 0 ? 0 : f.bits() > 4 ? f.bits() - 4 : f.bits() - 2;
    low_bits = f.bits() - high_bits;
    offset = f.offset;
    has_minimum = f.has_minimum;
    has_table = f.has_table;
    scales = f.scale_bits == 16  ? Scales::Halves
             : f.scale_bits == 4 ? Scales::StepNibbles
             : f.part == 16      ? Scales::Steps
                                 : Scales::Blocks;
  }

  // Bytes of a tile's parts.
  constexpr int64_t low_bytes(int64_t units) const { return units * 32 * 4 * low_bits; }
  constexpr int64_t high_bytes(int64_t units) const { return units * 32 * 4 * high_bits; }
  constexpr int64_t scale_bytes(int64_t units) const { return scales == Scales::None ? 0 : units * 8 * 8; }
  constexpr int64_t minimum_bytes(int64_t units) const {
    return scales == Scales::Halves && has_minimum ? units * 8 * 8 : 0;
  }
  constexpr int64_t super_bytes(int64_t units) const {
    return scales == Scales::None || scales == Scales::Halves ? 0 : units / 4 * 8 * (has_minimum ? 8 : 4);
  }
  constexpr int64_t bytes(int64_t units) const {
    return low_bytes(units) + high_bytes(units) + scale_bytes(units) + minimum_bytes(units) +
           super_bytes(units);
  }
};

/// A constant outside of kernels: they may not call what computes it.
template <DType T>
inline constexpr PackedFormat kPackedFormat{traits_of(T).format};

/// The type whose tiles hold a type's rows.
constexpr DType packed_type(DType type) {
  return type == DType::F32 || type == DType::F16 ? DType::BF16 : type;
}

/// fn.operator()<T>() with a packed_type as a constant T.
template <typename Fn>
void visit_packed(DType type, const Fn& fn) {
  if (type == DType::BF16)
    fn.template operator()<DType::BF16>();
  else
    visit_quantized(type, fn);
}

struct PackedMatrix {
  DType type = DType::BF16;  ///< packed_type
  int32_t tiles = 0;
  int32_t units = 0;                ///< of 64 columns; whole fours
  int32_t first_pair = 0;           ///< what pair 0 of tile 0 is in the layer's own numbering
  const uint8_t* low = nullptr;     ///< [tile][unit][vector of 16 bytes at most][lane]
  const uint8_t* high = nullptr;    ///< [tile][unit][lane]
  const uint2* scales = nullptr;    ///< [tile][unit][8]
  const uint2* minima = nullptr;    ///< Halves with a minimum: [tile][unit][8]
  const uint8_t* supers = nullptr;  ///< all but Halves: [tile][unit / 4][8]
};

/// The low (kShift 0) or high (8) bytes of kIq4[4 word .. + 3] as bf16.
constexpr uint32_t iq4_bytes(int shift, int word) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(kIq4[4 * word + i]));
    bytes |= (bits >> (16 + shift) & 255u) << (8 * i);
  }
  return bytes;
}

template <int kShift, int kWord>
inline constexpr uint32_t kIq4Bytes = iq4_bytes(kShift, kWord);

/// Those of four values, by the low nibbles of q.
template <int kShift>
CHIP_DEVICE uint32_t look_up_iq4(uint32_t q) {
  const uint32_t eighth = q & 0x7777u;
  return permute_bytes(permute_bytes(kIq4Bytes<kShift, 0>, kIq4Bytes<kShift, 1>, eighth),
                       permute_bytes(kIq4Bytes<kShift, 2>, kIq4Bytes<kShift, 3>, eighth),
                       mask_or(q >> 1, 0x4444u, 0x3210u));
}

struct Nothing {};

/// What a lane has read of one unit, and mma's operand made of it.
template <DType T>
struct Unit {
  static constexpr PackedFormat kFormat = kPackedFormat<T>;
  static constexpr bool kScaled = kFormat.scales != Scales::None;
  /// Of 16 columns; else of 32.
  static constexpr bool kScalePerStep =
      kFormat.scales == Scales::Steps || kFormat.scales == Scales::StepNibbles;
  static constexpr bool kHasMinimum = kFormat.has_minimum;
  static constexpr bool kHasSuper = kScaled && kFormat.scales != Scales::Halves;
  static constexpr int kLowBits = kFormat.low_bits, kVectors = kLowBits < 4 ? 1 : kLowBits / 4;
  static constexpr uint32_t kZero = 0x43004300u + 0x00010001u * static_cast<uint32_t>(kFormat.offset);

  using Low = std::conditional_t<kFormat.low_bits == 2, uint2, uint4>;
  using High = std::conditional_t<kFormat.high_bits == 2, uint2,
                                  std::conditional_t<kFormat.high_bits == 1, uint32_t, Nothing>>;
  Low q[kVectors];
  High h;
  std::conditional_t<kScaled, uint2, Nothing> s;
  std::conditional_t<kHasMinimum && !kHasSuper, uint2, Nothing> m;
  std::conditional_t<!kHasSuper, Nothing, std::conditional_t<kHasMinimum, uint2, uint32_t>> d;

  CHIP_DEVICE void load(const PackedMatrix& matrix, int64_t at, int lane) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      q[i] = load_once(reinterpret_cast<const Low*>(matrix.low) + (at * kVectors + i) * 32 + lane);
    if constexpr (kFormat.high_bits > 0)
      h = load_once(reinterpret_cast<const High*>(matrix.high) + at * 32 + lane);
    if constexpr (kScaled) s = load_once(matrix.scales + at * 8 + lane / 4);
    if constexpr (kHasMinimum && !kHasSuper) m = load_once(matrix.minima + at * 8 + lane / 4);
    if constexpr (kHasSuper) d = reinterpret_cast<const decltype(d)*>(matrix.supers)[at / 4 * 8 + lane / 4];
  }

  /// The integers less the offset, or the table's values, of 16 columns, as bf16 (all are exact).
  CHIP_DEVICE void operand(int block, int step, uint32_t (&a)[4]) const {
    if constexpr (kFormat.low_bits == 16) {
      const uint4 v = q[2 * block + step];
      a[0] = v.x;
      a[1] = v.y;
      a[2] = v.z;
      a[3] = v.w;
    } else if constexpr (kFormat.low_bits == 8) {
      const uint4 v = q[block];
      const uint32_t slot_a = step == 0 ? v.x : v.y, slot_b = step == 0 ? v.z : v.w;
      a[0] = widen(slot_a);
      a[1] = widen(slot_b);
      a[2] = widen(slot_a >> 8);
      a[3] = widen(slot_b >> 8);
    } else if constexpr (kFormat.has_table) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const uint32_t nibbles = nibbles_of(block, slot) >> (16 * step);
        const uint32_t low = look_up_iq4<0>(nibbles), high = look_up_iq4<8>(nibbles);
        a[slot] = permute_bytes(low, high, 0x5140u);
        a[2 + slot] = permute_bytes(low, high, 0x7362u);
      }
    } else {
      // 128 + q, of which the last bits are the integer's.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = i % 2, pair = 2 * step + i / 2;
        if constexpr (kFormat.low_bits == 4)
          a[i] = mask_or(nibbles_of(block, slot) >> (4 * pair), 0x000f000fu, 0x43004300u);
        else
          a[i] = mask_or((block == 0 ? q[0].x : q[0].y) >> (2 * pair + 8 * slot), 0x00030003u, 0x43004300u);
        if constexpr (kFormat.high_bits == 2)
          a[i] = mask_or(moved(block == 0 ? h.x : h.y, 2 * pair + 8 * slot - 4), 0x00300030u, a[i]);
        if constexpr (kFormat.high_bits == 1)
          a[i] = mask_or(moved(h, pair + 4 * block + 8 * slot - kLowBits), 0x00010001u << kLowBits, a[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = subtract_bf16(a[i], kZero);
    }
  }

  /// Of slots g and g + 8.
  CHIP_DEVICE float2 scale(int block, int step) const {
    if constexpr (kFormat.scales == Scales::Halves) {
      return unpack_f16(block == 0 ? s.x : s.y);
    } else if constexpr (kHasSuper) {
      float2 super;
      if constexpr (kHasMinimum)
        super = unpack_f16(d.x);
      else
        super = unpack_f16(d);
      const uint32_t word = block == 0 ? s.x : s.y;
      if constexpr (kFormat.scales == Scales::Blocks)
        return make_float2(super.x * signed_byte(word), super.y * signed_byte(word >> 16));
      const uint32_t both = word >> (16 * step);
      if constexpr (kFormat.scales == Scales::StepNibbles)
        return make_float2(super.x * static_cast<float>(both & 15u),
                           super.y * static_cast<float>(both >> 8 & 15u));
      return make_float2(super.x * signed_byte(both), super.y * signed_byte(both >> 8));
    } else {
      return make_float2(1.0f, 1.0f);
    }
  }
  CHIP_DEVICE float2 minimum(int block, int step) const {
    if constexpr (!kHasMinimum) {
      return make_float2(0.0f, 0.0f);
    } else if constexpr (kFormat.scales == Scales::Halves) {
      return unpack_f16(block == 0 ? m.x : m.y);
    } else {
      const float2 super = unpack_f16(d.y);
      const uint32_t word = block == 0 ? s.x : s.y;
      if constexpr (kFormat.scales == Scales::Blocks)
        return make_float2(super.x * signed_byte(word >> 8), super.y * signed_byte(word >> 24));
      const uint32_t both = word >> (16 * step);
      return make_float2(super.x * static_cast<float>(both >> 4 & 15u),
                         super.y * static_cast<float>(both >> 12 & 15u));
    }
  }

 private:
  CHIP_DEVICE uint32_t nibbles_of(int block, int slot) const {
    return block == 0 ? (slot == 0 ? q[0].x : q[0].y) : (slot == 0 ? q[0].z : q[0].w);
  }
  static CHIP_DEVICE uint32_t moved(uint32_t word, int right) {
    return right < 0 ? word << -right : word >> right;
  }
  static CHIP_DEVICE float signed_byte(uint32_t word) {
    return static_cast<float>(static_cast<int8_t>(word & 0xff));
  }
  /// Two signed bytes in 16-bit halves to bf16: 128 + the low seven bits, less 128, or 256 where negative.
  static CHIP_DEVICE uint32_t widen(uint32_t halves) {
    return subtract_bf16(mask_or(halves, 0x007f007fu, 0x43004300u),
                         mask_or(halves, 0x00800080u, 0x43004300u));
  }
};

}  // namespace qwen2vl::cuda
