#pragma once

// The vectors that the shared kernels in ../simd are written with, as AVX2, FMA and F16C have them
// (avx512/simd.h has the same names). Internal linkage throughout: see isa_kernels.h.

#include <immintrin.h>

#include <cstdint>

namespace qwen2vl::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kPanelRun = 4;  ///< of the table's PanelLayout

/// A gemm tile of P panels (two vectors each) has at most this many rows: accumulators, a panel's vectors and
/// a broadcast fit 16 registers. At least 8 independent accumulators need P = 4 for a single row.
constexpr int kWidestTile = 2;
constexpr int kWidestThinTile = 4;
constexpr int max_tile_rows(int panels) { return panels == 1 ? 6 : panels == 2 ? 3 : 1; }

using Vec = __m256;
using IntVec = __m256i;

inline __m256i first_lanes(int64_t n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
}

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
/// The first n (< kLanes) elements; `fill` in the other lanes.
inline Vec load_first(const float* p, int64_t n, Vec fill) {
  const __m256i mask = first_lanes(n);
  return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
inline void store_first(float* p, Vec v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v); }

inline Vec load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_first_f16(uint16_t* p, Vec v, int64_t n) {
  alignas(16) uint16_t half[kLanes];
  store_f16(half, v);
  for (int64_t i = 0; i < n; ++i) p[i] = half[i];
}

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
/// b where either is NaN, as x86 defines it.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float first(Vec a) { return _mm256_cvtss_f32(a); }
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

inline IntVec set1_int(int32_t x) { return _mm256_set1_epi32(x); }
inline IntVec load_int(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_int(uint8_t* p, IntVec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline IntVec load_int8(const uint8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
/// Lanes of 16 bits, by turns of the bytes at a and of those at b; with their signs, or unsigned.
template <bool kSigned>
IntVec load_pairs(const uint8_t* a, const uint8_t* b) {
  const __m128i bytes = _mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)),
                                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b)));
  return kSigned ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
}
/// The low byte of each.
inline void store_int8(int8_t* p, IntVec a) {
  const __m256i low = _mm256_set1_epi32(0x0c080400);
  const __m256i halves = _mm256_shuffle_epi8(a, low);
  const __m128i bytes =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
}
/// 16 bytes, to look up each by the low half of a byte (its highest bit is 0).
inline IntVec load_table(const int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline IntVec look_up(IntVec table, IntVec indices) { return _mm256_shuffle_epi8(table, indices); }
inline IntVec add(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return _mm256_sub_epi32(a, b); }
inline IntVec max(IntVec a, IntVec b) { return _mm256_max_epi32(a, b); }
inline IntVec min(IntVec a, IntVec b) { return _mm256_min_epi32(a, b); }
inline int32_t reduce_max(IntVec a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline IntVec bit_and(IntVec a, IntVec b) { return _mm256_and_si256(a, b); }
inline IntVec bit_or(IntVec a, IntVec b) { return _mm256_or_si256(a, b); }
inline IntVec bit_xor(IntVec a, IntVec b) { return _mm256_xor_si256(a, b); }
/// (a & a_mask) | (b & b_mask), where no bit is in both masks.
inline IntVec merge_bits(IntVec a, IntVec a_mask, IntVec b, IntVec b_mask) {
  return _mm256_or_si256(_mm256_and_si256(a, a_mask), _mm256_and_si256(b, b_mask));
}
/// The even bytes of a, the odd ones of b.
inline IntVec odd_bytes(IntVec a, IntVec b) {
  const __m256i even = _mm256_set1_epi16(0xff);
  return _mm256_or_si256(_mm256_and_si256(even, a), _mm256_andnot_si256(even, b));
}
inline IntVec shift_left(IntVec a, int n) { return _mm256_slli_epi32(a, n); }
inline IntVec shift_right(IntVec a, int n) { return _mm256_srli_epi32(a, n); }
inline IntVec shift_right_signed(IntVec a, int n) { return _mm256_srai_epi32(a, n); }
/// In lanes of 16 bits.
inline IntVec shift_left16(IntVec a, int n) { return _mm256_slli_epi16(a, n); }
inline IntVec shift_right16(IntVec a, int n) { return _mm256_srli_epi16(a, n); }
inline IntVec shift_right_signed16(IntVec a, int n) { return _mm256_srai_epi16(a, n); }
inline IntVec sub16(IntVec a, IntVec b) { return _mm256_sub_epi16(a, b); }
inline IntVec mul_low16(IntVec a, IntVec b) { return _mm256_mullo_epi16(a, b); }
/// Sums of pairs of products, in lanes of 32 bits.
inline IntVec add_products16(IntVec a, IntVec b) { return _mm256_madd_epi16(a, b); }
/// The even 16-bit lanes of a, the odd ones of b.
inline IntVec odd_lanes16(IntVec a, IntVec b) { return _mm256_blend_epi16(a, b, 0xaa); }
/// (a * b + 2^14) >> 15
inline IntVec mul_high_rounded16(IntVec a, IntVec b) { return _mm256_mulhrs_epi16(a, b); }
/// Keeps integer sums a chain: GCC would make a tree of them, whose leaves do not fit 16 registers.
inline IntVec chained(IntVec acc) {
#if defined(__GNUC__)
  __asm__("" : "+x"(acc));
#endif
  return acc;
}
inline Vec to_float(IntVec a) { return _mm256_cvtepi32_ps(a); }
inline IntVec to_int(Vec a) { return _mm256_cvtps_epi32(a); }
inline Vec as_float(IntVec a) { return _mm256_castsi256_ps(a); }
/// Integers that fit, of four vectors in order. Packing works within 128-bit halves.
inline void store_narrow(int16_t* p, const IntVec (&v)[4]) {
  for (int i = 0; i < 4; i += 2)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8 * i),
                        _mm256_permute4x64_epi64(_mm256_packs_epi32(v[i], v[i + 1]), 0xd8));
}
inline void store_narrow(uint8_t* p, const IntVec (&v)[4]) {
  const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
inline IntVec as_int(Vec a) { return _mm256_castps_si256(a); }

/// Which lanes; none where either is NaN.
using Mask = __m256;
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Vec select(Mask lanes, Vec a, Vec otherwise) { return _mm256_blendv_ps(otherwise, a, lanes); }

}  // namespace
}  // namespace qwen2vl::cpu
