#pragma once

// The vectors that the shared kernels in ../simd are written with, as aarch64's Advanced SIMD has them
// (avx2/simd.h has the same names; panels' kPanelRun is simd.h's, here and in ../i8mm). Internal linkage
// throughout: see isa_kernels.h.

#include <arm_neon.h>

#include <cstdint>

namespace qwen2vl::cpu {
namespace {

constexpr int kLanes = 4;

/// A gemm tile of P panels (four vectors each) has at most this many rows: 24 accumulators, a panel's vectors
/// and a broadcast fit 32 registers. At least 16 independent accumulators need P = 4 for a single row.
constexpr int kWidestTile = 2;
constexpr int kWidestThinTile = 4;
constexpr int max_tile_rows(int panels) { return panels == 1 ? 6 : panels == 2 ? 3 : 1; }

using Vec = float32x4_t;
using IntVec = int32x4_t;

inline IntVec from_bytes(int8x16_t a) { return vreinterpretq_s32_s8(a); }
inline int8x16_t as_bytes(IntVec a) { return vreinterpretq_s8_s32(a); }

inline void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

inline Vec set1(float x) { return vdupq_n_f32(x); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, v); }
/// The first n (< kLanes) elements; `fill` in the other lanes.
inline Vec load_first(const float* p, int64_t n, Vec fill) {
  float lanes[kLanes];
  vst1q_f32(lanes, fill);
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
inline void store_first(float* p, Vec v, int64_t n) {
  float lanes[kLanes];
  vst1q_f32(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

inline Vec load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Vec load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline void store_f16(uint16_t* p, Vec v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
inline void store_first_f16(uint16_t* p, Vec v, int64_t n) {
  uint16_t half[kLanes];
  store_f16(half, v);
  for (int64_t i = 0; i < n; ++i) p[i] = half[i];
}

inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
/// b where either is NaN, as x86 defines it.
inline Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec min(Vec a, Vec b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline Vec round_even(Vec a) { return vrndnq_f32(a); }
inline float first(Vec a) { return vgetq_lane_f32(a, 0); }
inline float reduce_add(Vec a) { return vaddvq_f32(a); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a); }

inline IntVec set1_int(int32_t x) { return vdupq_n_s32(x); }
inline IntVec load_int(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline void store_int(uint8_t* p, IntVec a) { vst1q_u8(p, vreinterpretq_u8_s32(a)); }
inline IntVec load_int8(const uint8_t* p) {
  uint32_t four;
  __builtin_memcpy(&four, p, sizeof four);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)))));
}
/// Lanes of 16 bits, by turns of the bytes at a and of those at b; with their signs, or unsigned.
template <bool kSigned>
IntVec load_pairs(const uint8_t* a, const uint8_t* b) {
  uint32_t first, second;
  __builtin_memcpy(&first, a, sizeof first);
  __builtin_memcpy(&second, b, sizeof second);
  const uint8x8_t bytes =
      vzip1_u8(vreinterpret_u8_u32(vdup_n_u32(first)), vreinterpret_u8_u32(vdup_n_u32(second)));
  return kSigned ? vreinterpretq_s32_s16(vmovl_s8(vreinterpret_s8_u8(bytes)))
                 : vreinterpretq_s32_u16(vmovl_u8(bytes));
}
/// The low byte of each.
inline void store_int8(int8_t* p, IntVec a) {
  const int16x4_t half = vmovn_s32(a);
  const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(half, half))), 0);
  __builtin_memcpy(p, &four, sizeof four);
}
/// 16 bytes, to look up each by the low half of a byte (its highest bit is 0).
inline IntVec load_table(const int8_t* table) { return from_bytes(vld1q_s8(table)); }
inline IntVec look_up(IntVec table, IntVec indices) {
  return from_bytes(vqtbl1q_s8(as_bytes(table), vreinterpretq_u8_s32(indices)));
}
/// Of the 32-bit lanes of a and b, every second one, from the first or the second on; and those of each half
/// by turns.
inline IntVec even_lanes(IntVec a, IntVec b) { return vuzp1q_s32(a, b); }
inline IntVec odd_lanes(IntVec a, IntVec b) { return vuzp2q_s32(a, b); }
inline IntVec low_by_turns(IntVec a, IntVec b) { return vzip1q_s32(a, b); }
inline IntVec high_by_turns(IntVec a, IntVec b) { return vzip2q_s32(a, b); }
inline IntVec add(IntVec a, IntVec b) { return vaddq_s32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return vsubq_s32(a, b); }
inline IntVec max(IntVec a, IntVec b) { return vmaxq_s32(a, b); }
inline IntVec min(IntVec a, IntVec b) { return vminq_s32(a, b); }
inline int32_t reduce_max(IntVec a) { return vmaxvq_s32(a); }
inline IntVec bit_and(IntVec a, IntVec b) { return vandq_s32(a, b); }
inline IntVec bit_or(IntVec a, IntVec b) { return vorrq_s32(a, b); }
inline IntVec bit_xor(IntVec a, IntVec b) { return veorq_s32(a, b); }
/// (a & a_mask) | (b & b_mask), where no bit is in both masks.
inline IntVec merge_bits(IntVec a, IntVec a_mask, IntVec b, IntVec b_mask) {
  return vbslq_s32(vreinterpretq_u32_s32(a_mask), a, vandq_s32(b, b_mask));
}
/// The even bytes of a, the odd ones of b.
inline IntVec odd_bytes(IntVec a, IntVec b) { return vbslq_s32(vdupq_n_u32(0x00ff00ff), a, b); }
inline IntVec shift_left(IntVec a, int n) { return a << n; }
inline IntVec shift_right(IntVec a, int n) { return vreinterpretq_s32_u32(vreinterpretq_u32_s32(a) >> n); }
inline IntVec shift_right_signed(IntVec a, int n) { return a >> n; }
/// In lanes of 16 bits.
inline IntVec shift_left16(IntVec a, int n) { return vreinterpretq_s32_s16(vreinterpretq_s16_s32(a) << n); }
inline IntVec shift_right16(IntVec a, int n) { return vreinterpretq_s32_u16(vreinterpretq_u16_s32(a) >> n); }
inline IntVec shift_right_signed16(IntVec a, int n) {
  return vreinterpretq_s32_s16(vreinterpretq_s16_s32(a) >> n);
}
inline IntVec sub16(IntVec a, IntVec b) {
  return vreinterpretq_s32_s16(vsubq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
inline IntVec mul_low16(IntVec a, IntVec b) {
  return vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
/// Sums of pairs of products, in lanes of 32 bits.
inline IntVec add_products16(IntVec a, IntVec b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
}
/// The even 16-bit lanes of a, the odd ones of b.
inline IntVec odd_lanes16(IntVec a, IntVec b) { return vbslq_s32(vdupq_n_u32(0xffff), a, b); }
/// (a * b + 2^14) >> 15
inline IntVec mul_high_rounded16(IntVec a, IntVec b) {
  return vreinterpretq_s32_s16(vqrdmulhq_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b)));
}
inline Vec to_float(IntVec a) { return vcvtq_f32_s32(a); }
inline IntVec to_int(Vec a) { return vcvtnq_s32_f32(a); }
inline Vec as_float(IntVec a) { return vreinterpretq_f32_s32(a); }
inline IntVec as_int(Vec a) { return vreinterpretq_s32_f32(a); }

/// Which lanes; none where either is NaN.
using Mask = uint32x4_t;
inline Mask less(Vec a, Vec b) { return vcltq_f32(a, b); }
inline Mask both(Mask a, Mask b) { return vandq_u32(a, b); }
inline Vec select(Mask lanes, Vec a, Vec otherwise) { return vbslq_f32(lanes, a, otherwise); }

}  // namespace
}  // namespace qwen2vl::cpu
