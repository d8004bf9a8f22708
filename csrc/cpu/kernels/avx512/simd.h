#pragma once

// The vectors that the shared kernels in ../simd are written with, as AVX-512 has them (avx2/simd.h has the
// same names). Internal linkage throughout: see isa_kernels.h.

// GCC's own header passes "undefined" vectors and is warned about (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include <cstdint>

namespace qwen2vl::cpu {
namespace {

constexpr int kLanes = 16;
constexpr int kPanelRun = 4;  ///< of the table's PanelLayout

/// A gemm tile of P panels has at most this many rows: accumulators, one vector per panel and a broadcast
/// fit 32 registers, and loads (two a cycle) stay below multiply-adds (two a cycle). At least 8 independent
/// accumulators (latency 4, two a cycle) need P >= 8 for a single row.
constexpr int kWidestTile = 5;
constexpr int kWidestThinTile = 8;
constexpr int max_tile_rows(int panels) { return panels == 1 ? 8 : panels <= 4 ? 6 : panels == 5 ? 5 : 3; }

using Vec = __m512;
using IntVec = __m512i;

inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
/// The first n (< kLanes) elements; `fill` in the other lanes.
inline Vec load_first(const float* p, int64_t n, Vec fill) {
  return _mm512_mask_loadu_ps(fill, first_lanes(n), p);
}
inline void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }

inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_first_f16(uint16_t* p, Vec v, int64_t n) {
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, first_lanes(n), half);
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
/// b where either is NaN, as x86 defines it.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline float first(Vec a) { return _mm512_cvtss_f32(a); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }

inline IntVec set1_int(int32_t x) { return _mm512_set1_epi32(x); }
inline IntVec load_int(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_int(uint8_t* p, IntVec a) { _mm512_storeu_si512(p, a); }
inline IntVec load_int8(const uint8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
/// Lanes of 16 bits, by turns of the bytes at a and of those at b; with their signs, or unsigned.
template <bool kSigned>
IntVec load_pairs(const uint8_t* a, const uint8_t* b) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  const __m256i bytes = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  return kSigned ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes);
}
/// The low byte of each.
inline void store_int8(int8_t* p, IntVec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
/// 16 bytes, to look up each by the low half of a byte (its highest bit is 0).
inline IntVec load_table(const int8_t* table) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline IntVec look_up(IntVec table, IntVec indices) { return _mm512_shuffle_epi8(table, indices); }
inline IntVec add(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
inline IntVec sub(IntVec a, IntVec b) { return _mm512_sub_epi32(a, b); }
inline IntVec max(IntVec a, IntVec b) { return _mm512_max_epi32(a, b); }
inline IntVec min(IntVec a, IntVec b) { return _mm512_min_epi32(a, b); }
inline int32_t reduce_max(IntVec a) { return _mm512_reduce_max_epi32(a); }
inline IntVec bit_and(IntVec a, IntVec b) { return _mm512_and_si512(a, b); }
inline IntVec bit_or(IntVec a, IntVec b) { return _mm512_or_si512(a, b); }
inline IntVec bit_xor(IntVec a, IntVec b) { return _mm512_xor_si512(a, b); }
/// (a & a_mask) | (b & b_mask), where no bit is in both masks.
inline IntVec merge_bits(IntVec a, IntVec a_mask, IntVec b, IntVec b_mask) {
  return _mm512_and_si512(_mm512_ternarylogic_epi32(a_mask, a, b, 0xca), _mm512_or_si512(a_mask, b_mask));
}
/// The even bytes of a, the odd ones of b.
inline IntVec odd_bytes(IntVec a, IntVec b) { return _mm512_mask_mov_epi8(a, 0xaaaaaaaaaaaaaaaau, b); }
inline IntVec shift_left(IntVec a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
inline IntVec shift_right(IntVec a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
inline IntVec shift_right_signed(IntVec a, int n) { return _mm512_srai_epi32(a, static_cast<unsigned>(n)); }
/// Keeps integer sums a chain: GCC would copy them, beyond 32 registers.
inline IntVec chained(IntVec acc) {
#if defined(__GNUC__)
  __asm__("" : "+v"(acc));
#endif
  return acc;
}
/// In lanes of 16 bits.
inline IntVec shift_left16(IntVec a, int n) { return _mm512_slli_epi16(a, static_cast<unsigned>(n)); }
inline IntVec shift_right16(IntVec a, int n) { return _mm512_srli_epi16(a, static_cast<unsigned>(n)); }
inline IntVec shift_right_signed16(IntVec a, int n) { return _mm512_srai_epi16(a, static_cast<unsigned>(n)); }
inline IntVec sub16(IntVec a, IntVec b) { return _mm512_sub_epi16(a, b); }
inline IntVec mul_low16(IntVec a, IntVec b) { return _mm512_mullo_epi16(a, b); }
/// Sums of pairs of products, in lanes of 32 bits.
inline IntVec add_products16(IntVec a, IntVec b) { return _mm512_madd_epi16(a, b); }
/// The even 16-bit lanes of a, the odd ones of b.
inline IntVec odd_lanes16(IntVec a, IntVec b) { return _mm512_mask_mov_epi16(a, 0xaaaaaaaau, b); }
/// (a * b + 2^14) >> 15
inline IntVec mul_high_rounded16(IntVec a, IntVec b) { return _mm512_mulhrs_epi16(a, b); }
/// acc += products of the unsigned bytes of `w` and the signed bytes of `x`, four to a lane. As an intrinsic,
/// GCC 12 keeps a copy of every sum on the stack.
inline void dot_step(IntVec& acc, IntVec w, IntVec x) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
  acc = _mm512_dpbusd_epi32(acc, w, x);
#endif
}
inline Vec to_float(IntVec a) { return _mm512_cvtepi32_ps(a); }
inline IntVec to_int(Vec a) { return _mm512_cvtps_epi32(a); }
inline Vec as_float(IntVec a) { return _mm512_castsi512_ps(a); }
/// Integers that fit, of four vectors in order.
inline void store_narrow(int16_t* p, const IntVec (&v)[4]) {
  for (int i = 0; i < 4; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), _mm512_cvtepi32_epi16(v[i]));
}
inline void store_narrow(uint8_t* p, const IntVec (&v)[4]) {
  for (int i = 0; i < 4; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * i), _mm512_cvtepi32_epi8(v[i]));
}
inline IntVec as_int(Vec a) { return _mm512_castps_si512(a); }

/// Which lanes; none where either is NaN.
using Mask = __mmask16;
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Vec select(Mask lanes, Vec a, Vec otherwise) { return _mm512_mask_mov_ps(otherwise, lanes, a); }

}  // namespace
}  // namespace qwen2vl::cpu
