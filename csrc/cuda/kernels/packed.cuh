#pragma once

// Weight matrices as the kernels read them. A matrix is a list of pairs of output features (a, b); a tile
// holds 8 pairs: slots 0..7 are the a's, slots 8..15 the b's, which are rows g and g + 8 of mma's 16 x 16
// operand, so that one lane ends up with both features of a pair: gate and up of SwiGLU, the two dimensions
// that RoPE turns, or simply features 2 p and 2 p + 1.
//
// Columns come in units of 64 (two blocks of 32, two steps of 16 each; zeros beyond the matrix). Lane 4 g + t
// of a warp holds, of slots g and g + 8, the four columns 16 step + 4 t .. + 3 of every step: two words of
// mma's operand in another order of k than mma's own, which is free as long as the other operand has the
// same. So every lane reads whole vectors of 16 bytes, a warp 512 neighbouring ones, and nothing is shuffled.
//
//   format   of            per lane and unit
//   Nibbles  Q4_0          quants uint4: word 2 block + (slot >= 8); pair i of columns of the block (i = 2
//   step + 0..1)
//                          at bits 4 i (first column) and 16 + 4 i (second); scales uint2: f16 [block][slot
//                          g, g + 8]
//   Bytes    Q8_0          quants uint4 [block]: words slot g: step 0, 1, slot g + 8: step 0, 1; bytes:
//   columns 0, 2,
//                          1, 3 of the four; scales as of Nibbles
//   Sixes    Q6_K          quants as of Nibbles (low bits); high uint2: word [block], 2 bits at 2 i + 8 (slot
//   >= 8) and
//                          16 beyond; scales uint2: int8 [block][step][slot g, g + 8]; super: f16 of slot g,
//                          g + 8 a 256 columns
//   Bf16     F32 F16 BF16  quants uint4 [block][step]: mma's four words
//
// Scales are shared by the four lanes of a slot.

#include "cuda/chip.h"

namespace qwen2vl::cuda {

enum class Format : int32_t { Nibbles, Bytes, Sixes, Bf16 };

inline constexpr int kTilePairs = 8, kTileSlots = 16, kUnit = 64, kBlock = 32;

struct PackedMatrix {
  Format format = Format::Bf16;
  int32_t tiles = 0;
  int32_t units = 0;                 ///< of 64 columns
  int32_t first_pair = 0;            ///< what pair 0 of tile 0 is in the layer's own numbering
  const uint4* quants = nullptr;     ///< [tile][unit][vector][lane]
  const uint2* high = nullptr;       ///< Sixes: [tile][unit][lane]
  const uint2* scales = nullptr;     ///< [tile][unit][8]
  const uint32_t* supers = nullptr;  ///< Sixes: [tile][unit / 4][8]
};

/// uint4 vectors of quants that a lane has a unit.
CHIP_HOST_DEVICE constexpr int quant_vectors(Format format) {
  return format == Format::Bytes ? 2 : format == Format::Bf16 ? 4 : 1;
}

/// What a lane has read of one unit, and mma's operand made of it.
template <Format format>
struct Unit;

CHIP_DEVICE float2 scale_pair(uint2 scales, int block) {
  return unpack_f16(block == 0 ? scales.x : scales.y);
}

/// Words of eight 4-bit values (two slots) -> mma's operand of one step, values 128 + q as bf16.
CHIP_DEVICE void spread_nibbles(uint32_t slot_a, uint32_t slot_b, int step, uint32_t (&a)[4]) {
  a[0] = mask_or(slot_a >> (8 * step), 0x000f000fu, 0x43004300u);
  a[1] = mask_or(slot_b >> (8 * step), 0x000f000fu, 0x43004300u);
  a[2] = mask_or(slot_a >> (8 * step + 4), 0x000f000fu, 0x43004300u);
  a[3] = mask_or(slot_b >> (8 * step + 4), 0x000f000fu, 0x43004300u);
}

template <>
struct Unit<Format::Nibbles> {
  static constexpr bool kScaled = true, kScalePerStep = false;
  uint4 q;
  uint2 s;

  CHIP_DEVICE void load(const PackedMatrix& m, int64_t at, int lane) {
    q = load_once(m.quants + at * 32 + lane);
    s = load_once(m.scales + at * 8 + lane / 4);
  }
  CHIP_DEVICE void operand(int block, int step, uint32_t (&a)[4]) const {
    spread_nibbles(block == 0 ? q.x : q.z, block == 0 ? q.y : q.w, step, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = subtract_bf16(a[i], 0x43084308u);  // 128 + 8
  }
  CHIP_DEVICE float2 scale(int block, int) const { return scale_pair(s, block); }
};

template <>
struct Unit<Format::Bytes> {
  static constexpr bool kScaled = true, kScalePerStep = false;
  uint4 q[2];
  uint2 s;

  CHIP_DEVICE void load(const PackedMatrix& m, int64_t at, int lane) {
    q[0] = load_once(m.quants + at * 64 + lane);
    q[1] = load_once(m.quants + at * 64 + 32 + lane);
    s = load_once(m.scales + at * 8 + lane / 4);
  }
  /// Two signed bytes in 16-bit halves to bf16: 128 + the low seven bits, less 128, or 256 where negative.
  static CHIP_DEVICE uint32_t widen(uint32_t halves) {
    return subtract_bf16(mask_or(halves, 0x007f007fu, 0x43004300u),
                         mask_or(halves, 0x00800080u, 0x43004300u));
  }
  CHIP_DEVICE void operand(int block, int step, uint32_t (&a)[4]) const {
    const uint4 v = q[block];
    const uint32_t slot_a = step == 0 ? v.x : v.y, slot_b = step == 0 ? v.z : v.w;
    a[0] = widen(slot_a);
    a[1] = widen(slot_b);
    a[2] = widen(slot_a >> 8);
    a[3] = widen(slot_b >> 8);
  }
  CHIP_DEVICE float2 scale(int block, int) const { return scale_pair(s, block); }
};

template <>
struct Unit<Format::Sixes> {
  static constexpr bool kScaled = true, kScalePerStep = true;
  uint4 q;
  uint2 h, s;
  uint32_t d;

  CHIP_DEVICE void load(const PackedMatrix& m, int64_t at, int lane) {
    q = load_once(m.quants + at * 32 + lane);
    h = load_once(m.high + at * 32 + lane);
    s = load_once(m.scales + at * 8 + lane / 4);
    d = m.supers[at / 4 * 8 + lane / 4];
  }
  CHIP_DEVICE void operand(int block, int step, uint32_t (&a)[4]) const {
    spread_nibbles(block == 0 ? q.x : q.z, block == 0 ? q.y : q.w, step, a);
    // Bits 4, 5 and 20, 21 are a pair's: of slot a's pair 2 step where the word is shifted left by 4 - 4
    // step.
    const uint32_t bits = block == 0 ? h.x : h.y;
    a[0] = mask_or(step == 0 ? bits << 4 : bits, 0x00300030u, a[0]);
    a[1] = mask_or(bits >> (4 + 4 * step), 0x00300030u, a[1]);
    a[2] = mask_or(step == 0 ? bits << 2 : bits >> 2, 0x00300030u, a[2]);
    a[3] = mask_or(bits >> (6 + 4 * step), 0x00300030u, a[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = subtract_bf16(a[i], 0x43204320u);  // 128 + 32
  }
  CHIP_DEVICE float2 scale(int block, int step) const {
    const float2 super = unpack_f16(d);
    const uint32_t both = (block == 0 ? s.x : s.y) >> (16 * step);
    return make_float2(super.x * static_cast<float>(static_cast<int8_t>(both & 0xff)),
                       super.y * static_cast<float>(static_cast<int8_t>(both >> 8 & 0xff)));
  }
};

template <>
struct Unit<Format::Bf16> {
  static constexpr bool kScaled = false, kScalePerStep = false;
  uint4 q[4];

  CHIP_DEVICE void load(const PackedMatrix& m, int64_t at, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = load_once(m.quants + at * 128 + i * 32 + lane);
  }
  CHIP_DEVICE void operand(int block, int step, uint32_t (&a)[4]) const {
    const uint4 v = q[2 * block + step];
    a[0] = v.x;
    a[1] = v.y;
    a[2] = v.z;
    a[3] = v.w;
  }
  CHIP_DEVICE float2 scale(int, int) const { return make_float2(1.0f, 1.0f); }
};

}  // namespace qwen2vl::cuda
