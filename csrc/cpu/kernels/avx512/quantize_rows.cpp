#include "cpu/kernels/avx512/simd.h"
#include "cpu/kernels/isa_kernels.h"
#include "cpu/kernels/simd/store_quants.h"

namespace qwen2vl::cpu {
namespace {

/// A block's integers and their corrections.
inline void store_block(__m512i low, __m512i high, const QuantizedRows& out, int64_t block) {
  const __m256i quants = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
  store_quants(quants, out, block);
}

/// What `quants` have left of x, in 256ths of the scale.
inline __m512i rest_of(__m512 x, __m512i quants, __m512 scale, __m512 by, __mmask16 keep) {
  const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(quants), scale, x);
  const __m512i q =
      _mm512_cvtps_epi32(_mm512_maskz_mul_ps(keep, rest, _mm512_mul_ps(by, _mm512_set1_ps(256))));
  return _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)), _mm512_set1_epi32(-127));
}

/// The rounding, and what becomes of tiny or non-finite blocks: generic/quantize_rows.cpp.
inline void quantize_block(const float* x, const QuantizedRows& out, int64_t block) {
  const __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
  // Compared as integers, magnitudes order as floats do, with infinity and NaN at the top.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const __m512i bits = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                        _mm512_and_si512(_mm512_castps_si512(high), magnitude));
  __m256i bits8 = _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
  __m128i bits4 = _mm_max_epi32(_mm256_castsi256_si128(bits8), _mm256_extracti128_si256(bits8, 1));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0x4e));
  bits4 = _mm_max_epi32(bits4, _mm_shuffle_epi32(bits4, 0xb1));
  const __m128 maximum = _mm_castsi128_ps(bits4);

  const bool finite = _mm_cvtsi128_si32(bits4) < 0x7f800000;
  __m128 inverse = _mm_setzero_ps(), factor = _mm_setzero_ps();
  if (finite && _mm_cvtss_f32(maximum) >= 1e-30f) {
    inverse = _mm_div_ps(_mm_set1_ps(127.0f), maximum);
    factor = _mm_div_ps(maximum, _mm_set1_ps(127.0f));
  } else if (!finite) {
    factor = _mm_castsi128_ps(_mm_set1_epi32(0x7fc00000));
  }
  const __mmask16 keep = finite ? 0xffff : 0;
  const __m512 by = _mm512_broadcastss_ps(inverse);
  const __m512i q_low = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(keep, low, by)),
                q_high = _mm512_cvtps_epi32(_mm512_maskz_mul_ps(keep, high, by));
  _mm_store_ss(out.scales + block, factor);
  store_block(q_low, q_high, out, block);
  if (out.planes == 1) return;
  const __m512 scale = _mm512_broadcastss_ps(factor);
  store_block(rest_of(low, q_low, scale, by, keep), rest_of(high, q_high, scale, by, keep), out,
              block + out.rows * (out.cols / kBlock32));
}

void quantize_rows(const float* x, int64_t x_stride, int64_t rows, const QuantizedRows& out,
                   int64_t row_begin) {
  const int64_t blocks = out.cols / kBlock32;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t block = (row_begin + i) * blocks;
    for (int64_t b = 0; b < blocks; ++b) quantize_block(x + i * x_stride + b * kBlock32, out, block + b);
  }
}

}  // namespace

namespace avx512 {
void add_quantize_rows(KernelTable& table) { table.quantize_rows = quantize_rows; }
}  // namespace avx512
}  // namespace qwen2vl::cpu
